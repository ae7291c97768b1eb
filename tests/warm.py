"""Prepare one run, for a fork server to preload: what torch imports late is then there already."""

from kdsurgeon.recipe import Recipe
from tests.resuming import EVERYTHING, ready

ready(Recipe(**EVERYTHING), "noisy")
