"""One thread and no network for every test, before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory):
    """A folder with a teacher.pt that knows the digits and a student.pt that does not yet."""
    from tests.models import digit_models

    return digit_models(tmp_path_factory.mktemp("digit-models"))
