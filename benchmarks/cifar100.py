"""The field's bench: CIFAR-100, one pair of networks, one method, one seed, one line of JSON.

    python -m benchmarks.cifar100 resnet32x4 teacher --data FOLDER
    python -m benchmarks.cifar100 resnet32x4:resnet8x4 block-kd --data FOLDER --seed 1 --epochs 60

METHOD is teacher or ce (labels only), kd (0.1 CE + 0.9 KL), dkd or block-kd. The recipe is that of
RepDistiller (benchmarks/recipes/cifar100.yaml); fewer --epochs shrink its schedule, decays kept.
Teachers are kept in --teachers and found there by name, seed and epochs. FOLDER holds CIFAR-100 as
published, or packed in zip files. Lines are appended to cifar100.jsonl: accuracy after the last
epoch and at best, on the 10,000 test images.

No figure yet: nothing of this has been run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from kdsurgeon import Batches, ModelCard, Recipe, load_data, load_model, prepare, save_model
from kdsurgeon import train_alone as train_with_labels
from kdsurgeon.recipe import read_yaml

FOLDER = Path(__file__).parent
SLOW = ("mobilenetv2", "shufflenetv2")  # their learning rate is a fifth of the others'
METHODS = {
    "teacher": {"method": "ce"},
    "ce": {"method": "ce"},
    "kd": {"method": "kd", "loss": {"ce_weight": 0.1, "kd_weight": 0.9}},
    "dkd": {"method": "kd", "loss": {"distance": "dkd"}},
    "block-kd": {"method": "block-kd"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", help="TEACHER:STUDENT, or one network")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--data", required=True, help="the folder of CIFAR-100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--teachers", type=Path, default=FOLDER / "teachers")
    parser.add_argument("--teacher-seed", type=int, default=0)
    parser.add_argument("--teacher-epochs", type=int, default=240)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stones", default="all")
    parser.add_argument("--amp", action="store_true")
    given = parser.parse_args()
    line = run(given)
    print(json.dumps(line))
    with (FOLDER / "cifar100.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def run(given: argparse.Namespace) -> dict[str, object]:
    """Train as asked; what is written down of it."""
    teacher_name, _, student_name = given.pair.partition(":")
    name = student_name or teacher_name
    recipe = recipe_for(name, given)
    data = load_data(f"cifar100:{given.data}", mean=recipe.data.mean, std=recipe.data.std)
    batches = Batches(
        data.train, recipe.batch_size, shuffle=True, seed=given.seed, augment="shift-flip"
    )
    validation = Batches(data.val, 500, shuffle=False, seed=0)
    torch.manual_seed(given.seed)
    model = load_model(f"cifar/{name}").model.to(given.device)
    began = time.monotonic()
    if recipe.method == "ce":
        epochs = train_with_labels(model, batches, recipe, validation=validation)
    else:
        teacher = trained(teacher_name, given)
        epochs = prepare(teacher, model, batches, recipe=recipe, validation=validation).epochs()
    scores = [epoch.accuracy for epoch in epochs if epoch.accuracy is not None]
    if given.method == "teacher":
        path = teacher_file(name, given.seed, given.epochs, given)
        path.parent.mkdir(exist_ok=True)
        save_model(model, path, ModelCard(arch=f"cifar/{name}", num_classes=100))
    return {
        "pair": given.pair,
        "method": given.method,
        "stones": given.stones,
        "seed": given.seed,
        "epochs": given.epochs,
        "last": round(scores[-1], 4),
        "best": round(max(scores), 4),
        "seconds": round(time.monotonic() - began),
        "device": given.device,
        "torch": torch.__version__,
    }


def recipe_for(name: str, given: argparse.Namespace) -> Recipe:
    """The published recipe, the method's losses put in, its schedule over the given epochs."""
    values = dict(read_yaml(FOLDER / "recipes" / "cifar100.yaml"))
    wishes = METHODS[given.method]
    values |= {"epochs": given.epochs, "seed": given.seed, "amp": given.amp}
    values["method"] = wishes["method"]
    values["loss"] = dict(values["loss"]) | wishes.get("loss", {})
    if given.method == "block-kd":
        values["loss"]["stones"] = given.stones
    if name in SLOW:
        values["optim"] = dict(values["optim"]) | {"lr": 0.01}
    return Recipe(**values)


def trained(name: str, given: argparse.Namespace) -> nn.Module:
    path = teacher_file(name, given.teacher_seed, given.teacher_epochs, given)
    if not path.exists():
        sys.exit(f"no {path}: train it first: python -m benchmarks.cifar100 {name} teacher …")
    return load_model(str(path)).model.to(given.device)


def teacher_file(name: str, seed: int, epochs: int, given: argparse.Namespace) -> Path:
    return given.teachers / f"{name}-seed{seed}-{epochs}.safetensors"


if __name__ == "__main__":
    sys.exit(main())
