"""``python -m tests.fuzz --count 10000 --seed 0 --jobs 2``: search; ``--replay SEED``: look at one.

Ends with 1 if an invariant is violated: its program is reduced and printed as runnable Python.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch

from tests.fuzz.generator import draw
from tests.fuzz.invariants import INVARIANTS, Finding, check, digest, fails
from tests.fuzz.programs import runnable, source
from tests.fuzz.shrinking import shrink

CHUNK = 20  # seeds that a process takes at a time
HASHED = 100  # programs that are planned under several hash seeds
SHOWN = 9  # violations of different words that are reduced and printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, replay, or (for a child) print digests; the exit code."""
    given = _parser().parse_args(arguments)
    names = given.invariants.split(",")
    if given.digests:
        for seed in range(given.seed, given.seed + given.count):
            print(digest(draw(seed)))
        return 0
    if given.replay is not None:
        program = draw(given.replay)
        print(source(program))
        found, _ = check(program, names)
        return _report(found)
    return _search(given.count, given.seed, given.jobs, names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="how many random classifiers")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--replay", type=int, metavar="SEED", help="check the one of this seed")
    parser.add_argument("--invariants", default=",".join(INVARIANTS), help="e.g. I1,I3")
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    return parser


def _search(count: int, seed: int, jobs: int, names: Sequence[str]) -> int:
    started = time.monotonic()
    chunks = [range(at, min(at + CHUNK, seed + count)) for at in range(seed, seed + count, CHUNK)]
    found: list[Finding] = []
    num_stones = done = 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for more, stones, graphs in pool.imap(partial(_check_all, names=tuple(names)), chunks):
            found += more
            num_stones += stones
            done += graphs
            _show_progress(done, count, found)
        pool.close()
        pool.join()
    code = _report(found)
    if "I5" in names and not same_under_every_hash_seed(seed, min(count, HASHED)):
        print("I5: under another PYTHONHASHSEED other plans are made")
        code = 1
    seconds = time.monotonic() - started
    print(f"{count} graphs, {num_stones} stones, {len(found)} violations, {seconds:.0f} s")
    return code


def _check_all(seeds: Sequence[int], names: Sequence[str]) -> tuple[list[Finding], int, int]:
    results = [check(draw(seed), names) for seed in seeds]
    return [each for found, _ in results for each in found], sum(n for _, n in results), len(seeds)


def _show_progress(done: int, count: int, found: Sequence[Finding]) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {count}, {len(found)} violations", end="", file=sys.stderr)


def _report(found: Sequence[Finding]) -> int:
    """Print each thing that was said once, with a program that shows it; 1 if there is any."""
    alike: dict[str, list[Finding]] = {}
    for finding in found:
        alike.setdefault(re.sub(r"\d+", "", finding.message), []).append(finding)
    for findings in list(alike.values())[:SHOWN]:
        first = findings[0]
        small = shrink(first.program, partial(fails, name=first.invariant))
        who = ", ".join(dict.fromkeys(finding.invariant for finding in findings))
        print(f"seed {first.program.seed} violates {first.invariant}: {first.message}")
        print(f"said {len(findings)} times, by {who}")
        print(f"reduced from {len(first.program.steps)} steps to {len(small.steps)}:\n")
        print(runnable(small))
    return 1 if found else 0


def same_under_every_hash_seed(seed: int, count: int) -> bool:
    """Whether two processes with other orders of sets make the same plans."""
    command = [sys.executable, "-m", "tests.fuzz", "--digests"]
    command += ["--seed", str(seed), "--count", str(count)]
    outputs = {
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    return len(outputs) == 1
