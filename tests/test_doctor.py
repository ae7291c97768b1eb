"""``kdsurgeon doctor`` names plugins whose library cannot be imported, and why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdsurgeon.cli.doctor import trouble_of
from kdsurgeon.errors import UsageError
from kdsurgeon.plugins import installed
from kdsurgeon.plugins import load as load_plugin

TOLD = "operator torchvision::nms does not exist"


@pytest.fixture(params=["timm", "torchvision"])
def broken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a library, as a torch that it was not made for leaves it."""
    (tmp_path / f"{request.param}.py").write_text(f"raise RuntimeError({TOLD!r})")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == request.param]:
        monkeypatch.delitem(sys.modules, name)
    return request.param


def test_a_library_that_fails_as_it_is_imported_is_a_usage_error(broken: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)needs {broken}.*{TOLD}.*that matches your torch"):
        load_plugin("models", broken)("resnet18")


def test_such_a_plugin_is_not_usable_and_others_are(broken: str) -> None:
    assert trouble_of(installed("models")[broken]) == TOLD
    assert trouble_of(installed("models")["demo"]) is None
    assert trouble_of(installed("distances")["kl"]) is None


def test_a_plugin_that_does_not_load_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = installed("distances")["dkd"]
    monkeypatch.setitem(sys.modules, plugin.target.partition(":")[0], None)
    found = trouble_of(plugin)
    assert found is not None and "dkd" in found
