"""Stepping stones: student blocks up to a depth, an adapter, the rest of the frozen teacher."""

from kdsurgeon.stones.certificate import Certificate, certify
from kdsurgeon.stones.fitting import fit_adapters
from kdsurgeon.stones.forecast import Forecast, forecast, forecast_of_run, within_budget
from kdsurgeon.stones.plan import Plan, Stone, partition, plan_stones, read_plan
from kdsurgeon.stones.sets import chosen_depths, stones_at
from kdsurgeon.stones.surgery import compose, graft
from kdsurgeon.stones.training_graph import TEACHER_LOGITS, SteppingStones, synthesize

__all__ = [
    "TEACHER_LOGITS",
    "Certificate",
    "Forecast",
    "Plan",
    "SteppingStones",
    "Stone",
    "certify",
    "chosen_depths",
    "compose",
    "fit_adapters",
    "forecast",
    "forecast_of_run",
    "graft",
    "partition",
    "plan_stones",
    "read_plan",
    "stones_at",
    "synthesize",
    "within_budget",
]
