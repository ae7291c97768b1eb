"""``python -m tests.exports --count 300 --seed 0``: random classifiers, each exported and compared.

Every file is compared at six batch sizes; ends with 1 if one is refused or lies beyond the bound.
``--faults`` lets every seeded fault happen instead, and ends with 1 if one of them passes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kdsurgeon.errors import SurgeonError
from kdsurgeon.exporting import export
from tests.exports.faults import FAULTS, refusal, refused_int8
from tests.fuzz.generator import draw
from tests.fuzz.programs import build, inputs, source

SHOWN = 25  # graphs after which it says how far it is
SAMPLES = 64  # so that the sizes compared are 1, 2, 3, 7, 16 and 64
BATCH_SIZES = (1, 2, 3, 7, 16, 64)


@dataclass(frozen=True)
class Outcome:
    """What became of one random classifier."""

    seed: int
    gap: float = 0.0
    scale: float = 0.0
    sizes: tuple[int, ...] = ()
    refusal: str = ""

    @property
    def relative(self) -> float:
        """The gap as a share of what is allowed to one in a hundred thousand."""
        return self.gap / max(1.0, self.scale)

    @property
    def holds(self) -> bool:
        return not self.refusal and self.relative <= 1e-5 and self.sizes == BATCH_SIZES


def exported(seed: int, folder: Path) -> Outcome:
    """Export the random classifier of ``seed``, and read what its parity is."""
    program = draw(seed)
    samples = inputs(SAMPLES, seed=seed, has_hint=program.has_hint)
    path = folder / "x.onnx"
    path.unlink(missing_ok=True)
    try:
        found = export(build(program), path, inputs(2, has_hint=program.has_hint), samples=samples)
    except SurgeonError as error:
        left = "; and left a file" if path.exists() else ""
        return Outcome(seed, refusal=f"{error}{left}")
    assert found.parity is not None
    return Outcome(seed, found.parity.gap, found.parity.scale, found.parity.batch_sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, or try the faults; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.exports", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="how many random classifiers")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--faults", action="store_true", help="try the seeded faults instead")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.faults:
            return _faults(Path(folder))
        return _search(given.count, given.seed, Path(folder))


def _search(count: int, seed: int, folder: Path) -> int:
    started = time.process_time()
    outcomes: list[Outcome] = []
    with suppress(KeyboardInterrupt):  # what was tried by then counts
        for number in range(seed, seed + count):
            outcomes.append(exported(number, folder))
            if not outcomes[-1].holds:
                print(f"seed {number}: {outcomes[-1]}\n{source(draw(number))}", flush=True)
            if len(outcomes) % SHOWN == 0:
                print(_summary(outcomes), flush=True)
    print(f"{_summary(outcomes)}, {time.process_time() - started:.0f} CPU s")
    return 0 if all(outcome.holds for outcome in outcomes) and len(outcomes) == count else 1


def _summary(outcomes: Sequence[Outcome]) -> str:
    failed = sum(not outcome.holds for outcome in outcomes)
    widest = max((outcome.gap for outcome in outcomes), default=0.0)
    worst = max((outcome.relative for outcome in outcomes), default=0.0)
    return (
        f"{len(outcomes)} graphs × {len(BATCH_SIZES)} batch sizes, {failed} failures, largest gap "
        f"{widest:.1e}, largest share of max(1, largest logit) {worst:.1e}"
    )


def _faults(folder: Path) -> int:
    passed = []
    tries = {name: partial(refusal, fault) for name, fault in FAULTS.items()}
    tries["a scale of zero in int8"] = refused_int8
    for name, attempt in tries.items():
        found = attempt(folder)
        print(f"{name}: {found or 'PASSED'}")
        passed += [] if found else [name]
    print(f"{len(tries) - len(passed)} of {len(tries)} faults refused")
    return 1 if passed else 0
