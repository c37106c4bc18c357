"""Recipes: one YAML file describes a run. Importing this package never imports torch."""

from recipes.loader import LoadedRecipe, dump_recipe, load_recipe
from recipes.schema import Recipe
from recipes.shipped import recipe_summary, shipped_recipes

__all__ = [
    "LoadedRecipe",
    "Recipe",
    "dump_recipe",
    "load_recipe",
    "recipe_summary",
    "shipped_recipes",
]
