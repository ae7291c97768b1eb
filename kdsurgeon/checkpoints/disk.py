"""Read a file once, through one descriptor, and write a file whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kdsurgeon.errors import ModelFileError, ResourceError


def read_once(path: Path) -> bytes:
    """Every byte of one regular file, from one descriptor; nothing is read again by name.

    What is hashed, checked and loaded afterwards are these bytes, so a file swapped in between
    changes nothing. Raises :class:`ModelFileError` when ``path`` is no regular file and
    :class:`ResourceError` when it may not be read or does not fit into memory.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelFileError(f"{path} does not exist.", fix="check the path") from error
    except IsADirectoryError as error:
        raise ModelFileError(f"{path} is a folder, not a model file.") from error
    except ValueError as error:  # a NUL in the name
        raise ModelFileError(f"{str(path)!r} is not a file name.") from error
    except OSError as error:
        raise _no_access(path, "read", error) from error
    try:
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ModelFileError(f"{path} is not a regular file.", fix="give a model file")
            return file.read()
    except OSError as error:
        raise _no_access(path, "read", error) from error
    except MemoryError as error:
        raise ResourceError(
            f"{path} does not fit into memory.", fix="use a machine with more memory"
        ) from error


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write ``chunks`` to a temporary name beside ``path``, flush to disk, then rename.

    At every moment ``path`` is either what it was or the whole new file; its permissions follow
    the umask. Raises :class:`ResourceError` when the folder cannot take it; nothing is left behind.
    """
    if path.exists() and not path.is_file():  # renaming would replace a device or a pipe
        raise ResourceError(f"{path} is not a regular file.", fix="choose the name of a file")
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with suppress(FileNotFoundError):
            draft.unlink()
        with draft.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise _no_access(path, "written", error) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def _flush_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where the system lets a folder be flushed."""
    with suppress(PermissionError, IsADirectoryError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
