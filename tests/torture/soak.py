"""Random histories of a run folder: save, be killed, fail, rot, go on, change the settings.

A hypothesis state machine beside a model of what must be there. Its seed replays it, and it prints
the history that failed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kdsurgeon.checkpoints import read_tensors, write_tensors
from kdsurgeon.errors import ModelFileError, ResourceError
from kdsurgeon.runs import Run, verify
from tests.torture.interposed import ERRORS, Died, Faulty

BASE = [Path(tempfile.gettempdir())]
STEPS = 25  # rules in one history
CALLS = 75  # a save makes about so many


class Folder(RuleBasedStateMachine):
    """A run folder, and what a careful reader knows about it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=BASE[0]))
        self.run = Run.create(self.folder / "run")
        self.run.write("config.yaml", "epochs: 1\n")
        self.is_open = True
        self.step = -1  # of the state in memory
        self.promised = -1  # the newest step whose save returned, and that has not rotted
        self.origin: int | None = None
        self.rotten: set[str] = set()
        self.best: set[int] = set()

    def teardown(self) -> None:
        self.run.close()
        shutil.rmtree(self.folder)

    # what happens ────────────────────────────────────────────────────────────────────────────────

    @precondition(lambda self: self.is_open)
    @rule(is_best=st.booleans())
    def save(self, is_best: bool) -> None:
        before = {int(path.name[5:11]) for path in self._checkpoints()}
        self._save(is_best)
        self._check_kept({step for step in before if step < self.step})

    @precondition(lambda self: self.is_open)
    @rule(index=st.integers(0, CALLS), half=st.booleans(), is_best=st.booleans())
    def die_while_saving(self, index: int, half: bool, is_best: bool) -> None:
        try:
            with Faulty(self.folder, index, "SIGKILL", half=half):
                self._save(is_best)
        except Died:
            self._leave()

    @precondition(lambda self: self.is_open)
    @rule(
        index=st.integers(0, CALLS),
        error=st.sampled_from(sorted(ERRORS)),
        half=st.booleans(),
        lasting=st.booleans(),
    )
    def fail_to_save(self, index: int, error: str, half: bool, lasting: bool) -> None:
        try:
            with Faulty(self.folder, index, error, half=half, lasting=lasting):
                self._save(False)
        except ResourceError:
            self._leave()

    @rule(which=st.integers(0, 9), place=st.integers(0, 10**6), bit=st.integers(0, 7))
    def rot(self, which: int, place: int, bit: int) -> None:
        """One bit of one file of one checkpoint."""
        files = [path for path in self._checkpoints() for path in sorted(path.iterdir())]
        if not files:
            return
        path = files[(len(files) - 1 - which) % len(files)]
        raw = bytearray(path.read_bytes())
        raw[place % len(raw)] ^= 1 << bit
        path.write_bytes(raw)
        self.rotten.add(path.parent.name)

    @precondition(lambda self: self.is_open)
    @rule(every=st.integers(0, 3))
    def reconfigure(self, every: int) -> None:
        self.run.keep_every = every

    @rule()
    def go_on(self) -> None:
        self._leave()
        self.run = Run.resume(self.folder / "run")
        self.is_open = True
        whole = [path for path in self._checkpoints() if self._is_whole(path)]
        try:
            checkpoint, complaints = self.run.latest_checkpoint()
        except ModelFileError as error:
            assert not whole, f"{whole[-1].name} is whole: {error}"
            self._begin_anew()
            return
        if checkpoint is None:
            assert self.promised < 0, f"step {self.promised} is gone"
            self.step, self.origin = -1, None
            return
        assert whole and checkpoint.path == whole[-1], f"{checkpoint.path.name} is not the newest"
        newer = self._checkpoints()[self._checkpoints().index(whole[-1]) + 1 :]
        assert len(complaints) == len(newer), complaints
        self.step = self.origin = checkpoint.facts["step"]
        if checkpoint.facts["is_best"]:  # its save may have been killed after it was there
            self.best = {self.step}
        assert checkpoint.state == {"step": self.step}
        assert checkpoint.tensors["student"]["weight"].tolist() == [float(self.step)] * 3
        if not newer:
            assert self.step >= self.promised, f"step {self.promised} is gone"
        self.promised = self.step
        self.run.rewind(checkpoint)
        assert [line["step"] for line in self.run.metrics()] == list(range(1, self.step + 1))

    # what must always hold ───────────────────────────────────────────────────────────────────────

    @invariant()
    def the_student_loads(self) -> None:
        for path in (self.folder / "run" / "student").glob("*.safetensors"):
            read_tensors(path)

    @invariant()
    def what_has_not_rotted_verifies(self) -> None:
        for path in self._checkpoints():
            if path.name.removesuffix(".old") not in self.rotten and path.name not in self.rotten:
                verify(path)

    def _check_kept(self, before: set[int]) -> None:
        here = {int(path.name[5:11]) for path in self._checkpoints()}
        assert max(here) == self.step, f"{max(here)} is newer than what was saved"
        assert max(before, default=self.step) in here, f"step {max(before)} is gone"
        if self.origin is not None:
            assert self.origin in here, f"step {self.origin}, gone on from, is gone"
        reached = {step for step in self.best if step <= self.step}
        if reached and f"step-{max(reached):06d}" not in self.rotten:
            assert max(reached) in here, f"the best, step {max(reached)}, is gone"

    # how ─────────────────────────────────────────────────────────────────────────────────────────

    def _save(self, is_best: bool) -> None:
        step = self.step + 1
        weights = {"weight": torch.full((3,), float(step))}
        if step:  # a run saves before its first step
            self.run.add_metrics({"step": step})
        write_tensors(weights, self.run.path / "student" / "last.safetensors")
        path = self.run.save_checkpoint(step, {"student": weights}, {"step": step}, best=is_best)
        self.step = self.promised = step
        self.rotten -= {path.name, f"{path.name}.old"}
        self.best = {step} if is_best else {each for each in self.best if each < step}

    def _leave(self) -> None:
        self.run.close()
        self.is_open = False

    def _begin_anew(self) -> None:
        self.teardown()
        self.__init__()

    def _is_whole(self, path: Path) -> bool:
        try:
            verify(path)
        except ModelFileError:
            return False
        return True

    def _checkpoints(self) -> list[Path]:
        folder = self.folder / "run" / "checkpoints"
        return sorted(folder.glob("step-*"), key=lambda path: (path.name[:11], not path.suffix))


def soak(base: Path, count: int, first_seed: int) -> None:
    """``count`` histories; raises what the first that fails raises, with its rules as notes."""
    BASE[0] = base
    machine: Any = seed(first_seed)(Folder)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=count,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # no shrinking: a history is short as it is
            suppress_health_check=list(HealthCheck),
        ),
    )
