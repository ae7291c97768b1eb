"""Let torch.compile make one program of a model, where it can, and say why where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdsurgeon.training.updating import Before


def compiled(model: nn.Module, trial: Callable[[nn.Module], Tensor]) -> tuple[nn.Module, str]:
    """``model`` compiled, or as it is, and a line on which of the two.

    Args:
        model: is left as it was; what comes back shares its weights.
        trial: a scalar from one batch. Compiling happens when a program first runs, so it is run
            once here, forward and backward; nothing of that stays.
    """
    before, was_training = Before(model), model.training
    before.remember()
    try:
        found: nn.Module = torch.compile(model.train())  # pyright: ignore[reportAssignmentType]
        trial(found).backward()
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return model, f"compile  not done, the graph runs as it is: {reason}"
    finally:
        model.zero_grad()
        model.train(was_training)
        before.restore()
    return found, "compile  the training graph is one program"
