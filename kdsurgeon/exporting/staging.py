"""Let a foreign tool write a file: whole or not at all, and without a word on the console."""

from __future__ import annotations

import errno
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime

from kdsurgeon.errors import ResourceError

# Loggers with a level of their own; silencing the root logger does not reach them.
_LOUD = (
    "torch.__trace",
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch.fx",
    "onnxscript",
    "onnx_ir",
)
_ORT_WARNING, _ORT_ERROR, _ORT_FATAL = 2, 3, 4


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to; the file takes its name only if the block ends well.

    Data files that the block leaves there, by the ending ``.data``, come along, before it and
    under the names that they have, so that no crash leaves a model without its weights. Whatever
    else the block leaves in that place is removed, also after an exception, and a file
    that already had the final name is then still there, untouched. Raises :class:`ResourceError`
    when the folder is missing, full or may not be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # renaming would replace a device or a pipe
            raise OSError(errno.EINVAL, "not a regular file")
        with TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
            part = Path(folder) / path.name
            yield part
            for data in sorted(Path(folder).glob("*.data")):
                _publish(data, path.with_name(data.name))
            _publish(part, path)
    except OSError as error:
        raise ResourceError(
            f"{path} could not be written.",
            why=error.strerror or str(error),
            fix="name a file in a folder that exists, may be written and has room",
        ) from error


def _publish(part: Path, path: Path) -> None:
    """Rename, once the content is on the disk."""
    with part.open("r+b") as file:
        os.fsync(file.fileno())
    part.replace(path)


@contextmanager
def silence() -> Iterator[None]:
    """Warnings, log records and prints of the tools called inside go nowhere; all is put back."""
    loggers = [logging.getLogger(name) for name in ("", *_LOUD)]
    levels = [logger.level for logger in loggers]
    # logging.warning() installs a handler for good on a root logger that has none.
    shield = logging.NullHandler()
    loggers[0].addHandler(shield)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        onnxruntime.set_default_logger_severity(_ORT_FATAL)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with redirect_stderr(io.StringIO()):
                yield
    finally:
        onnxruntime.set_default_logger_severity(_ORT_WARNING)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        loggers[0].removeHandler(shield)


def first_line(error: BaseException) -> str:
    """The first line that the innermost cause of ``error`` says."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
