"""What a policy makes for a suite: pictures, edited pictures, or answers to questions."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from common.errors import PolicyError
from evals.suites import Record, Suite

SHOWN = 512
"""Largest side, in pixels, of the copy that is kept of a picture asked about."""


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


@runtime_checkable
class AnsweringPolicy(Protocol):
    """What a suite of questions needs of a policy."""

    def answer(self, image: Image.Image, question: str) -> str:
        """Return the answer to a question about a picture, as text."""


@runtime_checkable
class ComparingPolicy(Protocol):
    """What a question about several pictures at once needs of a policy."""

    def answer_about(self, images: Sequence[Image.Image], question: str) -> str:
        """Return the answer to a question that calls the pictures "picture 1", "picture 2", ..."""


def not_supported(policy: object, suite: Suite) -> str | None:
    """Return why the policy cannot be evaluated on a suite of questions; None if it can."""
    if suite.answers and not isinstance(policy, AnsweringPolicy):
        return "the policy answers no questions"
    return None


def check_policy(policy: ImagePolicy, suite: Suite) -> None:
    """Raise PolicyError if the suite asks for edits and the policy takes no reference pictures."""
    edits = suite.reference is not None and not suite.answers
    if edits and getattr(policy.config, "edit_template", None) is None:
        raise PolicyError(
            f"suite `{suite.name}` asks for edits, and this policy draws from text alone.\n"
            "    Fix: evaluate a policy that was trained to edit (see recipes/tiny/edit.yaml)."
        )


def make(
    policy: ImagePolicy,
    suite: Suite,
    records: Sequence[Record],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> tuple[list[Image.Image], Sequence[Any]]:
    """Return for each record the picture to keep and what the suite scores.

    Both are the picture made; of a suite of questions the first is the picture asked about, made
    small, and the second the list of answers, or a text that says why the policy cannot give them.
    `settings` holds steps, guidance and temperature.
    """
    if suite.answers:
        return _answered(policy, suite, records)
    made = _pictures(policy, suite, records, seeds, settings)
    return made, made


def _answered(
    policy: object, suite: Suite, records: Sequence[Record]
) -> tuple[list[Image.Image], list[list[str] | str]]:
    assert suite.reference is not None  # a suite of questions has pictures to ask about
    shown, answers = [], []
    for record in records:
        first = suite.reference(record)
        pictures = suite.several(record) if suite.several else [first]
        answers.append(_answers_about(policy, pictures, record["questions"]))
        small = first.copy()
        small.thumbnail((SHOWN, SHOWN))
        shown.append(small)
    return shown, answers


def _answers_about(
    policy: object, pictures: Sequence[Image.Image], questions: Sequence[str]
) -> list[str] | str:
    if not isinstance(policy, AnsweringPolicy):
        return "the policy answers no questions"
    if len(pictures) == 1:
        return [policy.answer(pictures[0], question) for question in questions]
    if not isinstance(policy, ComparingPolicy):
        return f"asked about {len(pictures)} pictures, and the policy answers about one"
    return [policy.answer_about(pictures, question) for question in questions]


def _pictures(
    policy: ImagePolicy,
    suite: Suite,
    records: Sequence[Record],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> list[Image.Image]:
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
