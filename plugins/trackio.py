"""Trackio: a local dashboard (``trackio show``), by Hugging Face; project by TRACKIO_PROJECT."""

# pyright: reportAttributeAccessIssue=false
# It takes the library of the same name for this file.

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Trackio:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "kdsurgeon"),
            name=folder.name,
            resume="allow",
            config=dict(settings),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
