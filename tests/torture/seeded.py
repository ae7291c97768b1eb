"""Faults put into the product on purpose: the torture is worth what it notices of these."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from kdsurgeon import runs
from kdsurgeon.checkpoints import disk, store, write_whole
from kdsurgeon.checkpoints.disk import flush_folder
from kdsurgeon.runs import Checkpoint, Run


@contextmanager
def _replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


_publish = runs._publish
_read_checkpoint = runs.read_checkpoint


def pruned_before_published() -> AbstractContextManager[None]:
    def publish(draft: Path, final: Path) -> None:
        for old in final.parent.glob("step-*"):
            shutil.rmtree(old)
        _publish(draft, final)

    return _replaced((runs, "_publish", publish))


def written_in_place_manifest_first() -> AbstractContextManager[None]:
    def publish(draft: Path, final: Path) -> None:
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        for file in sorted(draft.iterdir()):
            write_whole(final / file.name, [file.read_bytes()])
        flush_folder(final.parent)
        shutil.rmtree(draft)

    return _replaced((runs, "_publish", publish))


def removed_before_replaced() -> AbstractContextManager[None]:
    def publish(draft: Path, final: Path) -> None:
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
        flush_folder(final.parent)

    return _replaced((runs, "_publish", publish))


def metrics_are_not_flushed() -> AbstractContextManager[None]:
    def describe(run: Run) -> dict[str, Any]:
        path = run.path / "metrics.jsonl"
        return runs._described(path.read_bytes() if path.exists() else b"")

    return _replaced((Run, "_flushed_metrics", describe))


def metrics_are_not_rewound() -> AbstractContextManager[None]:
    return _replaced((Run, "rewind", lambda *_: None))


def students_are_overwritten() -> AbstractContextManager[None]:
    def overwrite(path: Path, chunks: Any) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for chunk in chunks:
                os.write(descriptor, chunk)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        flush_folder(path.parent)

    return _replaced((store, "write_whole", overwrite))


def errors_of_a_flush_are_swallowed() -> AbstractContextManager[None]:
    def flush(folder: Path) -> None:
        with suppress(OSError):
            flush_folder(folder)

    return _replaced((disk, "flush_folder", flush), (runs, "flush_folder", flush))


def drafts_are_not_tidied_up() -> AbstractContextManager[None]:
    return _replaced((Run, "_tidy", lambda _: None))


def a_full_disk_is_like_any_error() -> AbstractContextManager[None]:
    return _replaced((disk, "is_full", lambda _: False), (runs, "is_full", lambda _: False))


def hashes_are_not_compared() -> AbstractContextManager[None]:
    def described(raw: bytes) -> dict[str, Any]:
        return {"bytes": len(raw)}

    def described_file(path: Path) -> dict[str, Any]:
        return {"bytes": path.stat().st_size}

    return _replaced((runs, "_described", described), (runs, "_described_file", described_file))


def only_the_newest_is_looked_at() -> AbstractContextManager[None]:
    here = Run._checkpoints

    def newest(run: Run) -> list[Path]:
        return here(run)[-1:]

    return _replaced((Run, "_checkpoints", newest))


def damage_is_not_told_of() -> AbstractContextManager[None]:
    latest = Run.latest_checkpoint

    def silent(run: Run) -> tuple[Checkpoint | None, list[str]]:
        return latest(run)[0], []

    return _replaced((Run, "latest_checkpoint", silent))


def one_checkpoint_is_kept() -> AbstractContextManager[None]:
    prune = Run._prune
    return _replaced((Run, "_prune", lambda run, newest, kept=1: prune(run, newest, 1)))


def the_optimiser_is_forgotten() -> AbstractContextManager[None]:
    def forgetful(path: Path) -> Checkpoint:
        found = _read_checkpoint(path)
        for name, tensor in found.tensors["optimizer"].items():
            if "exp_avg" in name:
                tensor.zero_()
        return found

    return _replaced((runs, "read_checkpoint", forgetful))


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        pruned_before_published,
        written_in_place_manifest_first,
        removed_before_replaced,
        metrics_are_not_flushed,
        metrics_are_not_rewound,
        students_are_overwritten,
        errors_of_a_flush_are_swallowed,
        drafts_are_not_tidied_up,
        a_full_disk_is_like_any_error,
        hashes_are_not_compared,
        only_the_newest_is_looked_at,
        damage_is_not_told_of,
        one_checkpoint_is_kept,
        the_optimiser_is_forgotten,
    )
}
