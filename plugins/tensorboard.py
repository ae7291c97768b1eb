"""TensorBoard: ``tensorboard --logdir RUN``. Writes event files without TensorBoard itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class TensorBoard:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is None:  # what a killed run told after its last checkpoint counts no more
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
