"""Prompts as token ids: chat templates, reference pictures, and text that stays text.

Sources: spec sections 1.2 (templates) and 1.9 (editing).
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.errors import DataError, PolicyError
from policy.config import PolicyConfig

REFERENCE = "<image>"
"""Stands in a prompt's text for the image tokens of one reference picture."""


def prompt_text(config: PolicyConfig, prompt: str, references: int = 0) -> str:
    """Return the chat template around `prompt`, ending in `<im_start><S0>`.

    Each reference picture is written as `<image>`, in the one block that the published model has
    for all of them.
    """
    template = config.prompt_template
    if references:
        if config.edit_template is None:
            raise PolicyError(
                "This policy takes no reference pictures; use one with edit connectors."
            )
        images = "this image" if references == 1 else "these images"
        template = config.edit_template.replace("{images}", images)
        template = template.replace("{references}", REFERENCE * references)
    return template.replace("{prompt}", prompt) + "<im_start><S0>"


class PromptEncoder:
    """Turns prompts into ids with a tokenizer whose added tokens no prompt can reach."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        facts = json.loads(tokenizer.backend_tokenizer.to_str())
        plain: dict[str, Any] = {"added_tokens": [], "padding": None, "truncation": None}
        self._plain = Tokenizer.from_str(json.dumps(facts | plain))
        self._added = tuple(tokenizer.get_added_vocab())

    def ids(
        self, config: PolicyConfig, prompts: Sequence[str], references: Tensor | None = None
    ) -> list[list[int]]:
        """Return the ids of each prompt's full text.

        `references` int64 [B, R, N] are image codes of R reference pictures for each prompt. The
        prompt and the template's own words beside it are tokenised together, as words run on, but
        without added tokens: text such as `<I12>` stays text and cannot inject image tokens.
        """
        count = 0 if references is None else references.shape[1]
        before, after = prompt_text(config, "{prompt}", count).split("{prompt}")
        block = REFERENCE * count
        until, rest = after.split(block) if count else (after, "")
        head, lead = self._split(before, last=True)
        trail, middle = self._split(until, last=False)
        texts = [lead + prompt + trail for prompt in prompts]
        encoded = self._plain.encode_batch(texts, add_special_tokens=False)
        first, between, end = self._template(head), self._template(middle), self._template(rest)
        rows = []
        for number, text in enumerate(encoded):
            ids = first + text.ids + between
            if references is not None:
                ids += (references[number].flatten() + config.image_start_id).tolist()
            rows.append(ids + end)
        return rows

    def _template(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _split(self, text: str, last: bool) -> tuple[str, str]:
        """Cut a piece of the template behind its last added token, or before its first one."""
        present = [re.escape(token) for token in self._added if token in text]
        found = list(re.finditer("|".join(present), text)) if present else []
        if last:
            cut = found[-1].end() if found else 0
        else:
            cut = found[0].start() if found else len(text)
        return text[:cut], text[cut:]


def check_length(ids: Sequence[Sequence[int]], prompts: Sequence[str], room: int) -> None:
    """Raise `DataError` for the first prompt of more than `room` tokens."""
    for row, prompt in zip(ids, prompts, strict=True):
        if len(row) > room:
            raise DataError(
                f"the prompt {prompt[:40]!r}... takes {len(row)} tokens with its template, and the "
                f"language model has room for {room} beside the picture.\n    Fix: shorten it."
            )
