"""The parts of the torture by name: what each tries, one item after the other, and what it finds.

``python -m tests.torture PART --count N --seed S --jobs J``; ``all`` takes them in turn. Ends with
1 if anything is wrong, or if a fault that was put in on purpose is not noticed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.torture import damage, elastic, faults, kills, power, seeded, soak

SHOWN = 20  # problems that are printed
RAM_DISK = Path("/dev/shm")
Found = tuple[int, list[str]]  # how many were tried, what is wrong


@dataclass(frozen=True)
class Part:
    """A row of the reliability table.

    ``make`` sets up what is tortured in an empty folder; ``items`` lists what is tried, for a count
    and a seed; ``try_one`` does it. ``controls`` are faults of :mod:`tests.torture.seeded`.
    """

    row: str
    what: str
    count: int
    make: Callable[[Path], Any]
    items: Callable[[Any, int, int], Iterable[Any]]
    try_one: Callable[[Any, Any], Found]
    controls: tuple[str, ...] = ()


def _one(problems: list[str], item: Any) -> Found:
    return 1, [f"{item}: {problem}" for problem in problems]


def _seeds(_: Any, count: int, seed: int) -> Iterable[int]:
    return range(seed, seed + count)


def _sampled(items: Sequence[Any], count: int, seed: int) -> Sequence[Any]:
    """All of them, or ``count`` of them in an order that the seed draws."""
    return items if not count else random.Random(seed).sample(items, min(count, len(items)))


def _chunks(size: int) -> Callable[[Any, int, int], Iterable[tuple[int, int]]]:
    """(seed, count) of at most ``size`` each; the seeds far enough apart to share nothing."""

    def chunks(_: Any, count: int, seed: int) -> Iterable[tuple[int, int]]:
        starts = range(0, count, size)
        return [(seed + 1000 * n, min(size, count - at)) for n, at in enumerate(starts)]

    return chunks


def _kill(server: kills.Server, item: tuple[int, int]) -> Found:
    seed, count = item
    tally = kills.kill_until(server, count, seed)
    return tally.kills, list(tally.problems)


def _cut_power(base: Path, fault: str) -> Found:
    folder = Path(tempfile.mkdtemp(dir=base))
    if not fault:
        return power.search(folder)
    _, found = power.search(folder, power.FAULTS[fault], first=True)
    return 0, [] if found else [f"not noticed: {fault}"]


def _soak(base: Path, item: tuple[int, int]) -> Found:
    seed, count = item
    try:
        soak.soak(base, count, seed)
    except Exception as error:
        notes = "\n".join(getattr(error, "__notes__", ()))
        return count, [f"seed {seed}: {error}\n{notes}"]
    return count, []


PARTS = {
    "mutants": Part(
        "G3",
        "mutants of our own files",
        10_000,
        damage.Mutants,
        _seeds,
        lambda subject, seed: _one(subject.problems(seed), f"seed {seed}"),
        ("hashes are not compared",),
    ),
    "kills": Part(
        "G7",
        "kill -9 of a real run",
        1_000,
        kills.Server,
        _chunks(10),
        _kill,
        ("the optimiser is forgotten",),
    ),
    "faults": Part(
        "G8",
        "errors at calls of the writer",
        0,
        faults.Faults,
        lambda subject, count, seed: _sampled(list(subject.cases()), count, seed),
        lambda subject, case: _one(subject.problems(case), case),
        (
            "metrics are not rewound",
            "students are overwritten",
            "pruned before published",
            "errors of a flush are swallowed",
            "drafts are not tidied up",
            "a full disk is like any error",
        ),
    ),
    "power": Part(
        "G9",
        "states after a power cut",
        0,
        lambda base: base,
        lambda _, count, seed: ["", *power.FAULTS],
        _cut_power,
    ),
    "elastic": Part(
        "G14",
        "kills of a rank under torchrun",
        20,
        elastic.Whole,
        _seeds,
        lambda subject, seed: _one(subject.problems(seed), f"seed {seed}"),
    ),
    "fallback": Part(
        "G10",
        "damaged checkpoints",
        0,
        damage.Fallback,
        lambda subject, count, seed: _sampled(
            [(name, n) for name in damage.DAMAGES for n in (1, 2, len(subject.names))], count, seed
        ),
        lambda subject, item: _one(subject.problems(*item), item),
        ("only the newest is looked at", "damage is not told of", "hashes are not compared"),
    ),
    "full": Part(
        "G16",
        "full disks",
        50,
        faults.FullDisk,
        lambda subject, count, seed: [
            (room, frees) for room in subject.rooms(count) for frees in (False, True)
        ],
        lambda subject, item: _one(subject.problems(item[0], frees=item[1]), item),
        ("a full disk is like any error", "students are overwritten"),
    ),
    "verify": Part(
        "G24",
        "changed bytes",
        1_000,
        damage.Sealed,
        _seeds,
        lambda subject, seed: _one(subject.problems(seed), f"seed {seed}"),
        ("hashes are not compared",),
    ),
    "soak": Part(
        "G26",
        "random histories",
        2_000,
        lambda base: base,
        _chunks(50),
        _soak,
        (
            "metrics are not rewound",
            "pruned before published",
            "hashes are not compared",
            "one checkpoint is kept",
            "only the newest is looked at",
        ),
    ),
}


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder, in memory where there is such a disk."""
    where = RAM_DISK if RAM_DISK.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="torture-", dir=where) as made:
        yield Path(made)


def search(name: str, count: int, seed: int) -> Found:
    """Try a part in this process."""
    part, tried, problems = PARTS[name], 0, []
    with folder() as base:
        subject = part.make(base)
        for item in part.items(subject, count, seed):
            found = part.try_one(subject, item)
            tried, problems = tried + found[0], problems + found[1]
    return tried, problems


def notices(name: str, fault: str, count: int, seed: int = 0) -> bool:
    """Whether a part finds a problem, within ``count`` items, when the product has a fault."""
    part = PARTS[name]
    with folder() as base, seeded.FAULTS[fault]():
        subject = part.make(base)
        items = part.items(subject, count, seed)
        return any(part.try_one(subject, item)[1] for item in items)


# several processes ───────────────────────────────────────────────────────────────────────────────

_subject: list[Any] = []


def _set_up(name: str, base: Path) -> None:
    torch.set_num_threads(1)
    own = Path(tempfile.mkdtemp(dir=base))
    _subject[:] = [PARTS[name], PARTS[name].make(own)]


def _try(item: Any) -> Found:
    part, subject = _subject
    return part.try_one(subject, item)


def _search_with(name: str, count: int, seed: int, jobs: int) -> Found:
    part, tried, problems = PARTS[name], 0, []
    context = multiprocessing.get_context("spawn")
    with folder() as base:
        first = base / "first"
        first.mkdir()
        items = list(part.items(part.make(first), count, seed))
        with context.Pool(jobs, initializer=_set_up, initargs=(name, base)) as pool:
            for found in pool.imap_unordered(_try, items):
                tried, problems = tried + found[0], problems + found[1]
            pool.close()
            pool.join()
    return tried, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--count", type=int, help="how many; the long form when left out")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    code = 0
    for name in PARTS if given.part == "all" else [given.part]:
        code |= _report(name, given.count, given.seed, given.jobs)
    return code


def _report(name: str, count: int | None, seed: int, jobs: int) -> int:
    part, started = PARTS[name], time.monotonic()
    count = part.count if count is None else count
    if jobs > 1:
        tried, problems = _search_with(name, count, seed, jobs)
    else:
        tried, problems = search(name, count, seed)
    for problem in problems[:SHOWN]:
        print(problem)
    seconds = time.monotonic() - started
    print(
        f"{part.row:4} {name:9} {tried:6,} {part.what}, {len(problems)} problems, "
        f"seed {seed}, {seconds:.0f} s",
        flush=True,
    )
    return 1 if problems else 0
