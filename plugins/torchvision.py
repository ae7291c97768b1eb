"""Models of torchvision by name: ``torchvision/resnet18``, with keyword arguments after commas."""

# pyright: reportAttributeAccessIssue=false
# It takes the library of the same name for this file.

from difflib import get_close_matches
from typing import Any

from torch import nn

from kdsurgeon import UsageError


def build(name: str, **kwargs: Any) -> nn.Module:
    """``torchvision.models.get_model(name, **kwargs)``; ``weights=DEFAULT`` loads from the hub.

    Raises:
        UsageError: torchvision is not installed or not made for this torch, or knows no such model.
    """
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"torchvision/{name} needs torchvision.",
            why=str(error),
            fix="pip install the torchvision that matches your torch",
        ) from error
    if name not in models.list_models():
        raise UsageError(
            f"torchvision has no model {name}.",
            near=", ".join(get_close_matches(name, models.list_models())),
            fix="torchvision.models.list_models() lists them",
        )
    return models.get_model(name, **kwargs)
