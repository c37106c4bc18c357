"""The recipe: a union of kinds, told apart by the key `kind`."""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from recipes.schema_grpo import GrpoRecipe
from recipes.schema_pretrain import AutoencoderRecipe, ImageTokenizerRecipe, PretrainRecipe

Recipe = Annotated[
    GrpoRecipe | PretrainRecipe | ImageTokenizerRecipe | AutoencoderRecipe,
    Field(discriminator="kind"),
]

KINDS: dict[
    str,
    type[GrpoRecipe] | type[PretrainRecipe] | type[ImageTokenizerRecipe] | type[AutoencoderRecipe],
] = {
    "grpo": GrpoRecipe,
    "pretrain": PretrainRecipe,
    "image_tokenizer": ImageTokenizerRecipe,
    "autoencoder": AutoencoderRecipe,
}

_EXTENDS = {
    "type": "string",
    "description": "Recipe this one is based on: a path relative to this file, or a shipped name.",
}


def file_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe *file*, for editors.

    It differs from the model's own in two ways: `extends` is allowed, and the keys that a file may
    leave to the recipe it extends are not required.
    """
    schema: dict[str, Any] = TypeAdapter(Recipe).json_schema(mode="validation")
    for name, definition in schema["$defs"].items():
        if name != "RewardFunction":  # lists are replaced whole, so their items are complete
            definition.pop("required", None)
        if name in {kind.__name__ for kind in KINDS.values()}:
            definition["properties"]["extends"] = _EXTENDS
    schema["anyOf"] = schema.pop("oneOf")
    schema.pop("discriminator")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Atelier recipe",
        **schema,
    }
