"""One thread, no network and a disk in memory for every test, before torch is imported."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

RAM_DISK = Path("/dev/shm")
HAS_ROOM = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > 4 << 30
if HAS_ROOM and "TMPDIR" not in os.environ:  # what is written is flushed, thousands of times
    os.environ["TMPDIR"] = tempfile.tempdir = str(RAM_DISK)


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory):
    """A folder with a teacher.pt that knows the digits and a student.pt that does not yet."""
    from tests.models import digit_models

    return digit_models(tmp_path_factory.mktemp("digit-models"))
