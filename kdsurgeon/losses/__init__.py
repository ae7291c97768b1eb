"""Logits in, one scalar out: every loss of the method, for all stepping stones at once."""

from kdsurgeon.losses.formulas import Logits, Losses, block_kd_loss, kl, task_loss

__all__ = ["Logits", "Losses", "block_kd_loss", "kl", "task_loss"]
