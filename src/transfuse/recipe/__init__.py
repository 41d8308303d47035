"""Recipes: a transfer as a YAML file, checked key by key before torch is imported or anything is loaded.

    result = Recipe.read("recipes/quickstart.yaml").run()

The shape of the file is :class:`~transfuse.recipe.schema.Content`. Paths in a recipe (weights, `file.py:function`,
arguments that a loader declares as paths) are relative to the recipe; `out` is relative to where you are.
Training and measuring: :class:`~transfuse.experiment.Transfer`.
"""

from transfuse.recipe.recipe import Recipe
from transfuse.recipe.resolve import accepts

__all__ = ["Recipe", "accepts"]
