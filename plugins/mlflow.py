"""MLflow; server and experiment by its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME).

Names of metrics may not hold what MLflow reserves: a space becomes an underscore.
"""

# pyright: reportAttributeAccessIssue=false
# It takes the library of the same name for this file.

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class MLflow:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        marker = folder / "mlflow-run"
        known = marker.read_text(encoding="utf-8") if marker.exists() else None
        run = mlflow.start_run(run_id=known, run_name=folder.name)
        if known is None:
            marker.write_text(run.info.run_id, encoding="utf-8")
            mlflow.log_params(dict(_flat(settings)))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        named = {name.replace(" ", "_"): value for name, value in numbers.items()}
        self._mlflow.log_metrics(named, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
