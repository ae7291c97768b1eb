"""Models of timm by name: ``timm/resnet50``, with keyword arguments after commas."""

# pyright: reportAttributeAccessIssue=false
# It takes the library of the same name for this file.

from difflib import get_close_matches
from typing import Any

from torch import nn

from kdsurgeon import UsageError


def build(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model(name, **kwargs)``; ``pretrained=true`` loads weights from the hub.

    Raises:
        UsageError: timm is not installed, cannot be imported, or knows no such model.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise UsageError(
            f"timm/{name} needs timm.",
            why=str(error),
            fix="pip install timm, and the torchvision that matches your torch",
        ) from error
    if not timm.is_model(name):
        raise UsageError(
            f"timm {timm.__version__} has no model {name}.",
            near=", ".join(get_close_matches(name, timm.list_models())),
            fix="timm.list_models() lists them",
        )
    return timm.create_model(name, **kwargs)
