"""Stepping stones: student blocks up to a depth, an adapter, the rest of the frozen teacher."""

from kdsurgeon.stones.forecast import Certificate, Forecast, certify, forecast
from kdsurgeon.stones.plan import Plan, Stone, partition, plan_stones, read_plan
from kdsurgeon.stones.surgery import compose, graft
from kdsurgeon.stones.training_graph import SteppingStones, synthesize

__all__ = [
    "Certificate",
    "Forecast",
    "Plan",
    "SteppingStones",
    "Stone",
    "certify",
    "compose",
    "forecast",
    "graft",
    "partition",
    "plan_stones",
    "read_plan",
    "synthesize",
]
