"""``kill -9`` of one process of several under torchrun, which starts them all anew.

Whatever was killed and whenever, the run must end by itself in the bits of one that was not.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.torture.kills import ARGUMENTS, NETWORKS
from tests.torture.sessions import differences, outcome

LIMIT = 120.0  # seconds; a run that hangs is killed then


def prepare(folder: Path) -> None:
    """A folder with the networks and images of the command line."""
    folder.mkdir()
    (folder / "nets.py").write_text(NETWORKS, encoding="utf-8")
    names: dict = {}
    exec(NETWORKS, names)
    images = names["images"]()
    with torch.no_grad():
        labels = names["teacher"]()(images.float() / 255).argmax(-1)
    np.savez(folder / "data.npz", images=images.numpy(), labels=labels.numpy())


def command(*more: str, restarts: int = 0) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return [*torchrun, "-m", "kdsurgeon", *ARGUMENTS, "-o", "run", *more]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent.parent)
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command line in a folder of its own."""
    prepare(folder)
    return subprocess.run(
        command(*more), cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=LIMIT, check=False,
    )  # fmt: skip


class Whole:
    """A run that nothing happened to, against which others are held."""

    def __init__(self, base: Path) -> None:
        self.base = base
        started = time.monotonic()
        done = run(base / "whole")
        self.seconds, self.said = time.monotonic() - started, done.stdout
        assert done.returncode == 0, done.stderr
        self.wanted = outcome(base / "whole" / "run")

    def problems(self, seed: int) -> list[str]:
        """Kill one of two processes: every second time while it trains, else at any moment."""
        folder = self.base / f"killed-{seed}"
        prepare(folder)
        said = folder / "said"
        with said.open("w") as file:
            agent = subprocess.Popen(
                command(restarts=1), cwd=folder, env=environment(), stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            is_killed = self._kill(
                agent, folder, random.Random(seed), while_it_trains=seed % 2 == 0
            )
            try:
                code = agent.wait(LIMIT)
            except subprocess.TimeoutExpired:
                agent.terminate()
                agent.wait()
                return [f"it hangs: {said.read_text()[-2000:]}"]
        if code:
            return [f"it ends with {code}: {said.read_text()[-2000:]}"]
        found = differences(outcome(folder / "run"), self.wanted)
        if not is_killed and seed % 2 == 0:
            found.append("nothing was killed")
        if not found:
            shutil.rmtree(folder)
        return found

    def _kill(
        self, agent: subprocess.Popen, folder: Path, drawn: random.Random, *, while_it_trains: bool
    ) -> bool:
        """Whether a process was there to be killed."""
        begun = folder / "run" / "checkpoints" / "step-000000"
        while while_it_trains and not begun.exists() and agent.poll() is None:
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 1 if while_it_trains else self.seconds))
        rank = drawn.randrange(2)
        while agent.poll() is None:
            children = _children(agent.pid)
            if len(children) == 2:
                os.kill(children[rank], signal.SIGKILL)
                return True
            time.sleep(0.05)
        return False


def _children(pid: int) -> list[int]:
    """The processes of ours that one has started."""
    try:
        texts = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return sorted(each for each in map(int, " ".join(texts).split()) if _is_ours(each))


def _is_ours(pid: int) -> bool:
    try:
        return b"kdsurgeon" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
