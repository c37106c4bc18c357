"""Parts of a recipe that every kind has. Units and ranges stand in each description."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
SceneTask = Literal[
    "single_object", "two_object", "counting", "colors", "position", "color_attr", "text"
]
"""Tasks of the scene world (`data/scenes.py`): GenEval's six and words on signs."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
Name = Annotated[
    str,
    Field(
        pattern=NAME_PATTERN,
        description="Name of the run, and of its folder: letters, digits and . _ -",
    ),
]
TextPath = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)]
"""A YAML list of strings."""


class Section(BaseModel):
    """A mapping in a recipe: unknown keys are errors, values keep the type they are written in."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Header(Section):
    """The first lines of every recipe."""

    version: Annotated[Literal[1], Field(description="Version of the recipe format: 1.")]
    name: Name
    seed: Annotated[
        int,
        Field(ge=0, lt=2**63, description="Seed of the whole run; every draw is derived from it."),
    ] = 0


class StepsSection(Section):
    """Steps and learning rate."""

    steps: Annotated[int, Field(ge=1, description="Number of optimizer steps.")]
    learning_rate: Annotated[
        float, Field(gt=0, le=1, description="Peak learning rate, per optimizer step.")
    ]


class OptimizerSection(StepsSection):
    """Steps, learning rate and what else an optimizer takes."""

    warmup_steps: Annotated[
        int, Field(ge=0, description="Steps over which the learning rate rises from 0 to its peak.")
    ] = 0
    weight_decay: Annotated[
        float, Field(ge=0, le=1, description="Decoupled weight decay (AdamW).")
    ] = 0.0
    grad_clip: Annotated[
        float | None, Field(gt=0, description="Largest gradient norm; null = no clipping.")
    ] = 1.0


class SaveSection(Section):
    """Checkpoints a run can be resumed from."""

    every: Annotated[int, Field(ge=1, description="Steps between two checkpoints.")] = 20
    keep_last: Annotated[
        int, Field(ge=1, description="Number of newest checkpoints that are kept.")
    ] = 2


class LogSection(Section):
    """Where numbers go besides `metrics.jsonl`, which is always written."""

    trackers: Annotated[
        tuple[Literal["trackio", "tensorboard", "wandb"], ...],
        Strict(False),
        Field(description="Experiment trackers to report to as well."),
    ] = ()


class LoraSection(Section):
    """Low-rank adapters: the base stays frozen and is the KL reference with the adapter off."""

    rank: Annotated[int, Field(ge=1, le=1024, description="Rank of each adapter.")] = 16
    alpha: Annotated[
        float, Field(gt=0, description="Scale of the adapter; its output is times alpha / rank.")
    ] = 32.0
    dropout: Annotated[
        float, Field(ge=0, lt=1, description="Probability of dropping an adapter input.")
    ] = 0.0
    targets: Annotated[
        Texts,
        Field(min_length=1, description="Names of the linear layers that get an adapter."),
    ] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def cross_error(key: str, message: str, fix: str) -> PydanticCustomError:
    """Return an error about `key` (dotted, from this section on) that the loader can explain."""
    context = {"key": key, "message": message, "fix": fix}
    return PydanticCustomError("cross_field", "{message}", context)
