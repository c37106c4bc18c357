"""What `policy.json` tells of where a policy came from."""

from dataclasses import replace

from policy.config import PolicyConfig
from recipes import Recipe


def with_stage(config: PolicyConfig, recipe: Recipe, start: str) -> PolicyConfig:
    """Return the description of a policy that `recipe` trained from the one with the hash `start`.

    Whatever was told before stays: the checkpoint that it was converted from, earlier stages.
    """
    stage = {
        "recipe": recipe.name,
        "kind": recipe.kind,
        "steps": recipe.train.steps,
        "seed": recipe.seed,
        "start": start,  # no path: it would tell of the machine
    }
    stages = [*config.provenance.get("stages", []), stage]
    return replace(config, provenance={**config.provenance, "stages": stages})
