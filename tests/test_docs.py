"""The commands in README.md and docs/ run as they stand there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from kdsurgeon.cli import main

ROOT = Path(__file__).parent.parent
PAGES = ["docs/command-line.md", "README.md"]


def commands(page: str) -> list[str]:
    """Every ``$ kdsurgeon …`` of the page's console blocks, but for those with timm's models."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = [line[len("$ kdsurgeon ") :] for block in blocks for line in block.splitlines()
             if line.startswith("$ kdsurgeon ")]  # fmt: skip
    return [line for line in lines if "timm/" not in line and not line.startswith("demo")]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_order(page, digit_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digit_models, tmp_path, dirs_exist_ok=True)
    text = (ROOT / page).read_text(encoding="utf-8")
    recipe = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    if recipe:
        Path("run.yaml").write_text(recipe[1], encoding="utf-8")
    found = commands(page)
    assert len(found) >= 4
    for line in found:
        line = re.sub(r"--epochs \d+", "--epochs 1", line)
        assert main(shlex.split(line)) == 0, (line, capsys.readouterr().err)
