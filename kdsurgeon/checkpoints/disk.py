"""Read a file once, through one descriptor, and write a file whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from kdsurgeon.errors import ModelFileError, ResourceError

BATCH = 1 << 20  # bytes gathered before they are written


def read_once(path: Path) -> bytes:
    """Every byte of one regular file, from one descriptor; nothing is read again by name.

    What is hashed, checked and loaded afterwards are these bytes, so a file swapped in between
    changes nothing. Raises :class:`ModelFileError` when ``path`` is no regular file and
    :class:`ResourceError` when it may not be read or does not fit into memory.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ModelFileError(f"{path} is not a regular file.", fix="give a model file")
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelFileError(f"{path} does not exist.", fix="check the path") from error
    except IsADirectoryError as error:
        raise ModelFileError(f"{path} is a folder, not a model file.") from error
    except ValueError as error:  # a NUL in the name
        raise ModelFileError(f"{str(path)!r} is not a file name.") from error
    except OSError as error:
        raise _no_access(path, "read", error) from error
    except MemoryError as error:
        raise ResourceError(
            f"{path} does not fit into memory.", fix="use a machine with more memory"
        ) from error


def _open_at_once(path: str, flags: int) -> int:
    """Opening a pipe does not wait for who writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write ``chunks`` to a temporary name beside ``path``, flush to disk, then rename.

    At every moment, also after a power cut, ``path`` is either what it was or the whole new file;
    its permissions follow the umask. Raises :class:`ResourceError` when the folder cannot take it;
    nothing is left behind.
    """
    if path.exists() and not path.is_file():  # renaming would replace a device or a pipe
        raise ResourceError(f"{path} is not a regular file.", fix="choose the name of a file")
    parts = [chunk for chunk in chunks if len(chunk)]
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_new(draft, parts)
        draft.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise cannot_write(path, error, needs=sum(map(len, parts))) from error
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def append(path: Path, text: str) -> None:
    """Add ``text`` to the end of a file, which is made if it is not there.

    A machine that stops meanwhile can leave a part of it. Raises :class:`ResourceError`.
    """
    raw = text.encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _write_all(descriptor, raw)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise cannot_write(path, error, needs=len(raw)) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each on disk when this returns."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):  # another process may have been faster
        path.mkdir()
    flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Bring a file and its name to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system lets it be flushed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if os.name == "nt" or error.errno == errno.EACCES:  # a folder that cannot be opened
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether the disk, or what a user may fill of it, is full."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def free_space(path: Path) -> int:
    """Bytes that are free where ``path`` is, or would be."""
    return shutil.disk_usage(path).free if path.exists() else free_space(path.parent)


def cannot_write(path: Path, error: OSError, *, needs: int) -> ResourceError:
    """What to tell of a file of ``needs`` bytes that could not be written."""
    refused = _no_access(path, "written", error)
    if is_full(error):
        refused.notes["room"] = f"it needs {in_words(needs)}, {in_words(free_space(path))} are free"
    return refused


def in_words(count: int) -> str:
    """A number of bytes in words, rounded up.

    >>> in_words(102_400_000), in_words(2_100), in_words(0)
    ('103 MB', '3 kB', '0 kB')
    """
    return f"{-(-count // 10**6):,} MB" if count >= 10**7 else f"{-(-count // 1000):,} kB"


def _write_new(path: Path, chunks: list[bytes | memoryview]) -> None:
    """A file that was not there, flushed; one that a process of this number left is replaced."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileExistsError:
        path.unlink()
        descriptor = os.open(path, flags, 0o666)
    try:
        for batch in _batched(chunks):
            _write_all(descriptor, batch)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _batched(chunks: list[bytes | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
    """The same bytes in fewer writes: a model can have thousands of tensors of one number."""
    batch = bytearray()
    for chunk in chunks:
        if len(chunk) < BATCH:
            batch += chunk
        if batch and (len(batch) >= BATCH or len(chunk) >= BATCH):
            yield batch
            batch = bytearray()
        if len(chunk) >= BATCH:
            yield chunk
    if batch:
        yield batch


def _write_all(descriptor: int, raw: bytes | bytearray | memoryview) -> None:
    """``os.write`` takes what it can, at most 2 GB."""
    rest = memoryview(raw)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _no_access(path: Path, verb: str, error: OSError) -> ResourceError:
    fixes = {
        errno.EACCES: "check the permissions of the file and its folder",
        errno.EPERM: "check the permissions of the file and its folder",
        errno.EROFS: "choose a folder that can be written",
        errno.ENOENT: "make the folder first",
        errno.ENOTDIR: "choose a folder, not a file, to write into",
        errno.EISDIR: "choose a file name, not a folder",
        errno.ENOSPC: "free some space on that disk",
        errno.EDQUOT: "free some space on that disk",
    }
    why = error.strerror or str(error)
    fix = fixes.get(error.errno or 0)
    return ResourceError(f"{path} could not be {verb}.", why=why, fix=fix)
