"""How images lie in memory: channels last is faster for convolutions, where a model can take it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdsurgeon.tracing import Inputs
from kdsurgeon.training.records import Moment, Objective


def arranged(inputs: Inputs, layout: torch.memory_format) -> Inputs:
    """Images, alone or among others, in that layout."""
    if isinstance(inputs, Tensor):
        return inputs.contiguous(memory_format=layout) if inputs.ndim == 4 else inputs
    return {
        name: value.contiguous(memory_format=layout) if value.ndim == 4 else value
        for name, value in inputs.items()
    }


def fastest_layout(
    model: nn.Module, objective: Objective, inputs: Inputs, target: Tensor, moment: Moment
) -> torch.memory_format:
    """Channels last, on which convolutions run 1.3 times faster, where the model can take it.

    A ``view`` that joins channels and positions cannot; such a model gets images as they come.
    """
    values = [inputs] if isinstance(inputs, Tensor) else inputs.values()
    if not any(value.ndim == 4 for value in values):
        return torch.contiguous_format
    few = inputs[:2] if isinstance(inputs, Tensor) else {k: v[:2] for k, v in inputs.items()}
    model.eval()  # draws nothing and moves no statistics
    try:
        with torch.no_grad():
            objective(arranged(few, torch.channels_last), target[:2], moment)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return torch.contiguous_format
    finally:
        model.train()
    return torch.channels_last
