"""The commands in README.md and docs/ run as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from kdsurgeon.cli import main
from kdsurgeon.demo import build

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
def test_the_commands_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = build("teacher")
    _teach(teacher)
    for name, model in (("teacher", teacher), ("student", build("student"))):
        card = {"arch": f"demo/{name}", "input_size": [1, 8, 8], "num_classes": 10}
        torch.save({**card, "state_dict": model.state_dict()}, f"{name}.pt")
    text = (ROOT / page).read_text(encoding="utf-8")
    recipe = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    if recipe:
        Path("run.yaml").write_text(recipe[1], encoding="utf-8")
    found = commands(page)
    assert len(found) >= 4
    for line in found:
        line = re.sub(r"--epochs \d+", "--epochs 1", line)
        assert main(shlex.split(line)) == 0, (line, capsys.readouterr().err)


def _teach(teacher):
    from kdsurgeon import Batches, Recipe, load_data, train_alone

    batches = Batches(load_data("digits").train, 64, shuffle=True, seed=0)
    recipe = Recipe(method="ce", epochs=2, optim={"lr": 3e-3})
    assert len(list(train_alone(teacher, batches, recipe))) == 2
