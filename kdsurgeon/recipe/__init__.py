"""Every number of a run as frozen records, read from YAML 1.2 and written back; without torch."""

from kdsurgeon.recipe.config import parse_set, read_config
from kdsurgeon.recipe.idle import idle_settings
from kdsurgeon.recipe.records import (
    FREE_ON_RESUME,
    DataRecipe,
    LossRecipe,
    OptimRecipe,
    Recipe,
    RunConfig,
    Section,
)
from kdsurgeon.recipe.writing import write_yaml
from kdsurgeon.recipe.yaml import Document, parse_yaml, read_yaml

__all__ = [
    "FREE_ON_RESUME",
    "DataRecipe",
    "Document",
    "LossRecipe",
    "OptimRecipe",
    "Recipe",
    "RunConfig",
    "Section",
    "idle_settings",
    "parse_set",
    "parse_yaml",
    "read_config",
    "read_yaml",
    "write_yaml",
]
