"""A fixed-length sampler of image tokens on a Hugging Face causal LM.

A sample depends on its prompt and its own seed, not on what else is in the batch: all its uniform
numbers are drawn up front from its own generator and tokens are read off the inverse of the
cumulative distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.errors import RunError
from policy.grouped_attention import GroupCache, use_group_attention

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

# The largest number below one that is used, so that `u * total` can never round up to the total.
_U_MAX = 1.0 - 2.0**-40


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the image rows' softmax.

    The order is temperature, then the `top_k` most probable tokens (0: all), then the smallest set
    of the most probable ones whose mass reaches `top_p`. `top_k=1` is greedy decoding.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise RunError(
                f"sampling temperature is {self.temperature}, but it must be above 0; "
                "for greedy decoding set top_k to 1"
            )
        if self.top_k < 0:
            raise RunError(f"sampling top_k is {self.top_k}; use 0 to keep all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise RunError(f"sampling top_p is {self.top_p}; it must be in (0, 1]")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate inside, each module's own mode restored afterwards.

    In training mode with gradient checkpointing the Hugging Face model silently drops its cache.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def truncated_logprobs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return float32 log-probs [B, V] of the distribution to sample from; -inf where cut off."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1)
        # Ascending, so that the least probable tail is cut and the top token always stays.
        cut = ordered.softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        cut[:, -1] = False
        logits = logits.masked_fill(cut.scatter(-1, order, cut), float("-inf"))
    return logits.log_softmax(-1)


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Return indices int64 [B] of log-probs [B, V] at the quantiles `uniforms` [B] in [0, 1)."""
    cumulative = logprobs.double().exp().cumsum(-1)
    target = uniforms.clamp(max=_U_MAX)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


class ImageTokenSampler:
    """Draws completions of a fixed length over the image rows of the vocabulary.

    `image_start_id` is the vocabulary id of image token 0, `length` is N, `pad_id` any id: it fills
    short prompts on the left and is never attended to. At most `micro_batch` sequences are sampled
    at the same time.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        image_start_id: int,
        num_image_tokens: int,
        length: int,
        pad_id: int,
        micro_batch: int = 256,
    ) -> None:
        if set(model.config.layer_types) != {"full_attention"}:
            raise RunError("the sampler needs a model with full attention only")
        self.model = model
        self._image_rows = slice(image_start_id, image_start_id + num_image_tokens)
        self._completion_length = length
        self._pad_id = pad_id
        self._micro_batch = micro_batch

    @torch.no_grad()
    def sample(
        self, prompt_ids: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return ids int64 and log-probs float32 [P * n, N] of `n` completions of each prompt.

        The log-probs are of the distribution really sampled. One seed for each of the P * n.
        """
        chunks = []
        with evaluation_mode(self.model):
            for prompts, samples in self._chunks(len(prompt_ids), n):
                uniforms = self._uniforms([seeds[index] for index in samples])
                chunks.append(
                    self._sample([prompt_ids[index] for index in prompts], sampling, uniforms)
                )
        tokens, logprobs = zip(*chunks, strict=True)
        return torch.cat(tokens), torch.cat(logprobs)

    def _uniforms(self, seeds: Sequence[int]) -> Tensor:
        """float64 [B, N] in [0, 1), each row from its own seed."""
        shape = (self._completion_length,)
        rows = [
            torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        return torch.stack(rows).to(self.model.device)

    def _chunks(self, prompts: int, n: int) -> Iterator[tuple[range, range]]:
        """Yield (prompts, samples): whole groups, or parts of one group larger than a batch."""
        if n > self._micro_batch:
            for prompt in range(prompts):
                for start in range(prompt * n, (prompt + 1) * n, self._micro_batch):
                    end = min(start + self._micro_batch, (prompt + 1) * n)
                    yield range(prompt, prompt + 1), range(start, end)
            return
        groups = self._micro_batch // n
        for start in range(0, prompts, groups):
            end = min(start + groups, prompts)
            yield range(start, end), range(start * n, end * n)

    def _sample(
        self, prompts: list[list[int]], sampling: Sampling, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sample uniforms [B, N] for P prompts, B / P each: tokens int64, log-probs f32 [B, N]."""
        device, (batch, steps) = self.model.device, uniforms.shape
        group = batch // len(prompts)
        width = max(map(len, prompts))
        ids = torch.tensor([[self._pad_id] * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([[len(p)] for p in prompts], device=device)
        columns = torch.arange(width, device=device)
        real = columns >= width - lengths
        # A padding query attends to itself alone: a row without any key would become NaN.
        seen = (real[:, None] & (columns[:, None] >= columns)) | (columns[:, None] == columns)
        cache = GroupCache(steps - 1)
        positions = (columns - width + lengths).clamp(min=0)
        hidden = self._forward(ids, self._bias(seen[:, None]), positions, cache)
        hidden = hidden.repeat_interleave(group, dim=0)
        bias = self._bias(real[:, None, None])
        position = lengths.repeat_interleave(group, dim=0)
        head = self.model.lm_head.weight[self._image_rows]
        tokens = torch.empty(batch, steps, dtype=torch.int64, device=device)
        chosen = torch.empty(batch, steps, dtype=torch.float32, device=device)
        with use_group_attention(self.model):
            for step in range(steps):
                logprobs = truncated_logprobs(nn.functional.linear(hidden, head), sampling)
                codes = draw(logprobs, uniforms[:, step])
                chosen[:, step] = logprobs.gather(1, codes[:, None])[:, 0]
                tokens[:, step] = codes + self._image_rows.start
                if step + 1 < steps:
                    last = tokens[:, step : step + 1]
                    hidden = self._forward(last, bias, position + step, cache)
                    cache.advance()
        return tokens, chosen

    def _bias(self, seen: Tensor) -> Tensor:
        bias = torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device)
        return bias.masked_fill_(~seen, float("-inf"))

    def _forward(self, ids: Tensor, bias: Tensor, positions: Tensor, cache: GroupCache) -> Tensor:
        """Run the decoder and return the hidden state [B, H] of each row's last token."""
        output = self.model.model(
            input_ids=ids,
            attention_mask={"full_attention": bias},
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden


def left_pad(
    sequences: Sequence[list[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 [B, longest]; short sequences are padded on the left."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)
