"""Pictures and tables of models, plans and runs; they return text or rich renderables."""

from kdsurgeon.views.drawing import draw_plan
from kdsurgeon.views.report import plan_page, run_report
from kdsurgeon.views.tables import (
    Row,
    accuracy_finding,
    accuracy_table,
    comparison_table,
    cut_points_table,
    explain_table,
    plan_table,
)

__all__ = [
    "Row",
    "accuracy_finding",
    "accuracy_table",
    "comparison_table",
    "cut_points_table",
    "draw_plan",
    "explain_table",
    "plan_page",
    "plan_table",
    "run_report",
]
