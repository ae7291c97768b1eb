"""Carry a student's boundary tensor into the teacher's layout, and start there by least squares."""

from __future__ import annotations

from kdsurgeon.adapters.building import Adapter, build, num_parameters
from kdsurgeon.adapters.choosing import adapter_for
from kdsurgeon.adapters.fitting import Fit
from kdsurgeon.adapters.spec import AdapterSpec, Operation

__all__ = ["Adapter", "AdapterSpec", "Fit", "Operation", "adapter_for", "build", "num_parameters"]
