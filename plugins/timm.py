"""Models of timm by name: ``timm/resnet50``, with keyword arguments after commas."""

# pyright: reportAttributeAccessIssue=false
# It takes the library of the same name for this file.

from typing import Any

from torch import nn

from kdsurgeon import UsageError


def build(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model(name, **kwargs)``; ``pretrained=true`` loads weights from the hub.

    Raises:
        UsageError: timm is not installed, or knows no such model.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"timm/{name} needs timm.", why=str(error), fix="pip install timm"
        ) from error
    if not timm.is_model(name):
        raise UsageError(
            f"timm {timm.__version__} has no model {name}.",
            fix=f"timm.list_models('*{name.split('_')[0]}*') lists the near ones",
        )
    return timm.create_model(name, **kwargs)
