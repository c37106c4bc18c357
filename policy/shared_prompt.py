"""One teacher-forced pass in which the samples of a group share the pass over their prompt."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def tail_states(decoder: Any, input_ids: Tensor, attention_mask: Tensor, tail: int) -> Tensor:
    """Return hidden states [B, tail, H] of the last `tail` of left-padded `input_ids` [B, T].

    `decoder` is a transformers decoder without its head. Rows that agree in all tokens before the
    tail share one pass over those, whose keys and values the tails then attend to. Attention looks
    back alone, so that this is the same function, and its gradient, as of whole sequences: what is
    spared is (1 - 1 / group size) of the prompts' share, which is small for a short prompt and half
    of the pass where a reference picture stands in the prompt. With dropout (`policy.lora.dropout`)
    a group shares one mask over its prompt, where whole sequences would draw one each.
    """
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    before = slice(0, input_ids.shape[1] - tail)
    prompts, owner = torch.unique(
        torch.stack([input_ids[:, before], attention_mask[:, before]], 1),
        dim=0,
        return_inverse=True,
    )
    # While it recomputes activations the library drops its cache without a word.
    if len(prompts) == len(input_ids) or decoder.is_gradient_checkpointing:
        output = decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        )
        return output.last_hidden_state[:, -tail:]
    cache = DynamicCache(config=decoder.config)
    ids, mask = prompts.unbind(1)
    decoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_select_indices(owner)
    hidden: Tensor = decoder(
        input_ids=input_ids[:, -tail:],
        attention_mask=attention_mask,
        position_ids=positions[:, -tail:],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return hidden
