"""The public names, imported in one place; the package serves them when first asked for."""

from kdsurgeon.checkpoints import ModelCard, load_model, save_model
from kdsurgeon.data import Batches
from kdsurgeon.data import load as load_data
from kdsurgeon.distillation import distill, prepare, train_alone
from kdsurgeon.errors import DataError, SurgeonError, UsageError
from kdsurgeon.evaluation import accuracy, evaluate
from kdsurgeon.exporting import export
from kdsurgeon.losses import Logits, block_kd_loss, linear_block_kd_loss
from kdsurgeon.partitioning import find_cut_points
from kdsurgeon.recipe import Recipe
from kdsurgeon.stones import (
    Plan,
    certify,
    fit_adapters,
    forecast,
    partition,
    read_plan,
    synthesize,
    within_budget,
)
from kdsurgeon.teacher_cache import cache_teacher
from kdsurgeon.tracing import Trace, trace
from kdsurgeon.training import Epoch

__all__ = [
    "Batches",
    "DataError",
    "Epoch",
    "Logits",
    "ModelCard",
    "Plan",
    "Recipe",
    "SurgeonError",
    "Trace",
    "UsageError",
    "accuracy",
    "block_kd_loss",
    "cache_teacher",
    "certify",
    "distill",
    "evaluate",
    "export",
    "find_cut_points",
    "fit_adapters",
    "forecast",
    "linear_block_kd_loss",
    "load_data",
    "load_model",
    "partition",
    "prepare",
    "read_plan",
    "save_model",
    "synthesize",
    "trace",
    "train_alone",
    "within_budget",
]
