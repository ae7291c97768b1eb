"""One thread and no network for every test, before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory):
    """A folder with a teacher.pt that knows the digits and a student.pt that does not yet."""
    import torch

    from kdsurgeon import Batches, Recipe, load_data, train_alone
    from kdsurgeon.demo import build

    folder = tmp_path_factory.mktemp("digit-models")
    torch.manual_seed(0)
    teacher, student = build("teacher"), build("student")
    recipe = Recipe(method="ce", epochs=1, optim={"lr": 3e-3, "warmup_epochs": 0.2})
    batches = Batches(load_data("digits").train, 64, shuffle=True, seed=0)
    assert len(list(train_alone(teacher, batches, recipe))) == 1
    for name, model in (("teacher", teacher), ("student", student)):
        card = {"arch": f"demo/{name}", "input_size": [1, 8, 8], "num_classes": 10}
        torch.save({**card, "state_dict": model.state_dict()}, folder / f"{name}.pt")
    return folder
