"""Weights & Biases. A resumed run goes on under the same id; project and mode by its own variables
(WANDB_PROJECT, WANDB_MODE)."""

# pyright: reportAttributeAccessIssue=false
# It takes the library of the same name for this file.

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WeightsAndBiases:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        run_id = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]
        self._run = wandb.init(
            dir=str(folder), name=folder.name, id=run_id, resume="allow", config=dict(settings)
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
