"""Let torchvision be imported where its compiled operators cannot be loaded.

It registers shapes for two of them unconditionally, so their schemas must exist beforehand. Goes
when torchvision has a build for every torch that we test with.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _load_operators() -> None:
    """Torchvision's own operators, which register the schemas themselves; OSError without them."""
    spec = find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("_C*.so"):
            torch.ops.load_library(library)


def prepare() -> None:
    """Make ``import torchvision`` work; a second call changes nothing."""
    try:
        _load_operators()
    except OSError:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", SCHEMA)


prepare()
