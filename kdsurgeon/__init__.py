"""Knowledge distillation by graph surgery.

kdsurgeon reads a teacher and a student into graphs, cuts them where one tensor holds everything,
and aligns them boundary by boundary. From the alignment it synthesizes one training graph that
runs the student once and steps, from every boundary, through an adapter onto the rest of the
teacher. Training sees only that graph and its logits; what remains is the untouched-looking
student and its ONNX file, proved equal.

    plan = kdsurgeon.partition(teacher, student, example)
    for epoch in kdsurgeon.distill(teacher, student, batches, plan=plan): ...
    kdsurgeon.export(student, "student.onnx", example)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "load_model",
    "save_model",
    "ModelCard",
    "load_data",
    "Batches",
    "trace",
    "Trace",
    "find_cut_points",
    "partition",
    "read_plan",
    "Plan",
    "certify",
    "forecast",
    "within_budget",
    "synthesize",
    "fit_adapters",
    "Logits",
    "block_kd_loss",
    "linear_block_kd_loss",
    "cache_teacher",
    "Recipe",
    "prepare",
    "distill",
    "train_alone",
    "Epoch",
    "accuracy",
    "evaluate",
    "export",
    "SurgeonError",
    "UsageError",
    "DataError",
]  # in the order of the pipeline

if TYPE_CHECKING:
    from kdsurgeon.public import *


def __getattr__(name: str) -> Any:
    """Import torch and all that only when a public name is used, so that --help stays fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdsurgeon import public

    return getattr(public, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
