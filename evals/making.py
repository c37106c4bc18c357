"""Making the pictures of a suite: from prompts alone, or from instructions and pictures to edit."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from common.errors import PolicyError
from evals.suites import Record, Suite


class ImagePolicy(Protocol):
    """What evaluation needs of a policy (`policy.Policy` has it)."""

    config: Any
    """Holds the default `steps` and `guidance`, and `edit_template` where references are taken."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        temperature: float,
        seeds: Sequence[int],
        references: Any = None,
    ) -> list[Image.Image]:
        """Return one picture for each prompt, each drawn with its own seed.

        `references` are pixels [B, 3, H, W] in [-1, 1] of the pictures to edit; they are given to
        policies with an `edit_template` alone.
        """


def check_policy(policy: ImagePolicy, suite: Suite) -> None:
    """Raise PolicyError if the suite asks for edits and the policy takes no reference pictures."""
    if suite.reference is not None and getattr(policy.config, "edit_template", None) is None:
        raise PolicyError(
            f"suite `{suite.name}` asks for edits, and this policy draws from text alone.\n"
            "    Fix: evaluate a policy that was trained to edit (see recipes/tiny/edit.yaml)."
        )


def make_pictures(
    policy: ImagePolicy,
    suite: Suite,
    records: Sequence[Record],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> list[Image.Image]:
    """Return one picture for each record; `settings` holds steps, guidance and temperature."""
    prompts = [str(record["prompt"]) for record in records]
    how = {key: settings[key] for key in ("steps", "guidance", "temperature")}
    if suite.reference is None:
        return policy.generate(prompts, seeds=seeds, **how)
    import torch

    from policy.pixels import to_pixels

    references = [suite.reference(record) for record in records]
    made: dict[int, Image.Image] = {}
    # A picture does not depend on its batch, so references of one size are edited together.
    for size in dict.fromkeys(reference.size for reference in references):
        places = [i for i, reference in enumerate(references) if reference.size == size]
        edited = policy.generate(
            [prompts[i] for i in places],
            seeds=[seeds[i] for i in places],
            references=torch.stack([to_pixels(references[i]) for i in places]),
            **how,
        )
        made |= dict(zip(places, edited, strict=True))
    return [made[i] for i in range(len(records))]
