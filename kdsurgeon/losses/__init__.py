"""Logits in, one scalar out: every loss of the method, for all stepping stones at once."""

from kdsurgeon.losses.block_kd import block_kd_loss
from kdsurgeon.losses.distances import load_distance
from kdsurgeon.losses.formulas import Distance, Logits, Losses, kl, task_loss
from kdsurgeon.losses.fused import can_fuse
from kdsurgeon.losses.linear import linear_block_kd_loss

__all__ = [
    "Distance",
    "Logits",
    "Losses",
    "block_kd_loss",
    "can_fuse",
    "kl",
    "linear_block_kd_loss",
    "load_distance",
    "task_loss",
]
