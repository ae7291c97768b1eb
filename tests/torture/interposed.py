"""The disk as the writer sees it: every call that changes something, counted, refused or recorded.

The product has no hooks. While a :class:`Disk` is in use, the functions of ``os`` that change files
are replaced; calls that concern other folders pass through untouched.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REAL = SimpleNamespace(
    open=os.open,
    write=os.write,
    fsync=os.fsync,
    rename=os.rename,
    replace=os.replace,
    mkdir=os.mkdir,
    unlink=os.unlink,
    rmdir=os.rmdir,
    disk_usage=shutil.disk_usage,
)
CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EPERM", "EINTR")}


class Died(BaseException):
    """The process was killed: nothing that it does from now on reaches the disk."""


@dataclass(frozen=True)
class Call:
    """One call: its name, what it concerns, and where it would move it."""

    name: str
    path: Path
    target: Path | None = None
    flags: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.path.name}"


class Disk:
    """Counts the calls below ``root``; subclasses let some of them fail."""

    def __init__(self, root: Path) -> None:
        self.root = str(root.resolve())
        self.calls: list[Call] = []

    def before(self, call: Call) -> None:
        """Asked before each call; what it raises, the caller gets."""

    def write(self, call: Call, descriptor: int, data: Any) -> int:
        """Do a write."""
        return REAL.write(descriptor, data)

    def done(self, call: Call, args: tuple[Any, ...], result: Any) -> None:
        """Told after each call that was made."""

    def __enter__(self) -> Disk:
        for name in CALLS:
            setattr(os, name, self._watched(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name in CALLS:
            setattr(os, name, getattr(REAL, name))

    def _watched(self, name: str) -> Callable[..., Any]:
        real = getattr(REAL, name)

        def watched(*args: Any, **options: Any) -> Any:
            call = _call(name, args, options)
            if call is None or not f"{call.path}/".startswith(f"{self.root}/"):
                return real(*args, **options)
            self.calls.append(call)
            self.before(call)
            result = self.write(call, *args) if name == "write" else real(*args, **options)
            self.done(call, args, result)
            return result

        return watched


def _call(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Call | None:
    if name in ("write", "fsync"):
        return Call(name, _path_of(args[0]))
    target = _full(args[1], None) if name in ("rename", "replace") else None
    flags = args[1] if name == "open" else 0
    path = _full(args[0], options.get("dir_fd"))
    return Call(name, path, target, flags)


def _full(path: Any, folder: int | None) -> Path:
    name = Path(os.fsdecode(path))
    return Path(_path_of(folder), name) if folder is not None else Path.cwd() / name


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


class Faulty(Disk):
    """A disk on which the call of one index fails, or at which the process dies.

    ``error`` is a name of :data:`ERRORS` or ``SIGKILL``. With ``half``, a write is cut in two and
    the second half fails. With ``lasting``, so does every call after it that needs space.
    """

    def __init__(
        self, root: Path, index: int, error: str, *, half: bool = False, lasting: bool = False
    ) -> None:
        super().__init__(root)
        self.index, self.error, self.half, self.lasting = index, error, half, lasting
        self.is_dead = False
        self.hit: Call | None = None
        self._rest_fails = False

    def before(self, call: Call) -> None:
        if self.is_dead:
            raise Died
        if self._rest_fails and call.name == "write":
            self._rest_fails = False
            self._fail(call)
        if self.hit is not None and self.lasting and needs_space(call):
            self._fail(call)
        if len(self.calls) - 1 == self.index and not (self.half and call.name == "write"):
            self._fail(call)

    def write(self, call: Call, descriptor: int, data: Any) -> int:
        if len(self.calls) - 1 != self.index or not self.half:
            return REAL.write(descriptor, data)
        written = REAL.write(descriptor, memoryview(data)[: len(data) // 2])
        self.hit = call
        if self.error == "SIGKILL":
            self._fail(call)
        self._rest_fails = True
        return written

    def _fail(self, call: Call) -> None:
        self.hit = call
        if self.error == "SIGKILL":
            self.is_dead = True
            raise Died
        number = ERRORS[self.error]
        raise OSError(number, os.strerror(number))


def needs_space(call: Call) -> bool:
    """Whether a full disk refuses the call."""
    return call.name in ("write", "mkdir") or bool(call.flags & os.O_CREAT)


class Full(Disk):
    """A disk that takes ``room`` bytes more; with ``frees``, what is deleted makes room again."""

    def __init__(self, root: Path, room: int, *, frees: bool = False) -> None:
        super().__init__(root)
        self.room, self.frees = room, frees
        self.written = 0
        self._in_use = self._used()

    @property
    def free(self) -> int:
        gone = self._used() - self._in_use if self.frees else self.written
        return max(0, self.room - gone)

    def _used(self) -> int:
        files = (path for path in Path(self.root).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    def write(self, call: Call, descriptor: int, data: Any) -> int:
        room = self.free
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = REAL.write(descriptor, memoryview(data)[:room])
        self.written += written
        return written

    def __enter__(self) -> Disk:
        shutil.disk_usage = lambda _: SimpleNamespace(free=self.free)  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        shutil.disk_usage = REAL.disk_usage
        super().__exit__()
