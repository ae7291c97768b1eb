"""Train a graph: batches and a loss in, one Epoch per iteration out; knows no surgery, no files."""

from kdsurgeon.training.compiling import compiled
from kdsurgeon.training.exactness import (
    changes,
    conditions,
    determinism,
    is_exact,
    prepare_cublas,
)
from kdsurgeon.training.layout import fastest_layout
from kdsurgeon.training.loop import train
from kdsurgeon.training.optimising import Average, check_optimizer, learning_rate_at
from kdsurgeon.training.randomness import RandomState, scatter
from kdsurgeon.training.records import Batches, Epoch, Moment, Objective, Step, Trouble
from kdsurgeon.training.sharding import all_like, here, whole_weights
from kdsurgeon.training.state import TrainingState, start
from kdsurgeon.training.stopping import Stop, StopWaiting, until
from kdsurgeon.training.together import Together, share
from kdsurgeon.training.updating import Before, check_batch_norm

__all__ = [
    "Average",
    "Batches",
    "Before",
    "Epoch",
    "Moment",
    "Objective",
    "RandomState",
    "Step",
    "Stop",
    "StopWaiting",
    "Together",
    "TrainingState",
    "Trouble",
    "all_like",
    "changes",
    "check_batch_norm",
    "check_optimizer",
    "compiled",
    "conditions",
    "determinism",
    "fastest_layout",
    "here",
    "is_exact",
    "learning_rate_at",
    "prepare_cublas",
    "scatter",
    "share",
    "start",
    "train",
    "until",
    "whole_weights",
]
