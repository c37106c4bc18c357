"""Weight sync that proves itself: push, read back, and compare what both sides compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from policy.sampling import evaluation_mode
from rollout.engine import Engine, WeightMismatch, fingerprint_tensors
from rollout.weights import merged_tensors, split_tensors

PROBE_TOKENS = 4
"""Tokens drawn after each probe prompt: the first by the pass over the prompt, the others by the
kernels that read the cache."""


class TrainerSide(Protocol):
    """What the trainer must offer so that a sync can be verified."""

    step: int
    probe_prompts: list[list[int]]

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """All weights: adapters merged, under the names of `Qwen3ForCausalLM`, or beside them."""

    def pushed_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Those that the engine does not have already."""

    def completion_logprobs(self, prompt_ids: list[list[int]], completion_ids: Tensor) -> Tensor:
        """float32 [P, N]: teacher-forced log-probs of int64 [P, N] over the image rows, T = 1.

        Of a token outside of these rows -inf.
        """


class ModelSide:
    """`TrainerSide` of a causal LM in this process, plain or wrapped by PEFT.

    `adapter`: the engine has the base, and the adapter is pushed by itself (`split_tensors`).
    """

    def __init__(
        self,
        model: nn.Module,
        step: int,
        probe_prompts: Sequence[Sequence[int]],
        image_start_id: int,
        num_image_tokens: int,
        adapter: bool = False,
    ) -> None:
        self.step = step
        self.probe_prompts = [list(ids) for ids in probe_prompts]
        self._model = model
        self._image_rows = slice(image_start_id, image_start_id + num_image_tokens)
        self._adapter = adapter

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainerSide`."""
        return split_tensors(self._model) if self._adapter else merged_tensors(self._model)

    def pushed_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainerSide`."""
        tensors = self.named_tensors()
        return (pair for pair in tensors if not self._adapter or ".lora_" in pair[0])

    @torch.no_grad()
    def completion_logprobs(self, prompt_ids: list[list[int]], completion_ids: Tensor) -> Tensor:
        """See `TrainerSide`."""
        device, length = next(self._model.parameters()).device, completion_ids.shape[1]
        first, last = self._image_rows.start, self._image_rows.stop - 1
        known = completion_ids.clamp(first, last)
        pairs = zip(prompt_ids, known, strict=True)
        # Padding on the right: nothing attends to what comes later.
        ids = pad_sequence([torch.cat([torch.tensor(p), c]) for p, c in pairs], batch_first=True)
        with evaluation_mode(self._model):
            logits = self._model(input_ids=ids.to(device)).logits[..., self._image_rows]
        starts = [len(prompt) - 1 for prompt in prompt_ids]
        drawn = torch.stack([logits[i, at : at + length] for i, at in enumerate(starts)])
        codes = known.to(device)[..., None] - first
        logprobs = drawn.float().log_softmax(-1).gather(-1, codes)[..., 0].cpu()
        return logprobs.masked_fill(known != completion_ids, float("-inf"))


def push_weights(engine: Engine, trainer_side: TrainerSide) -> None:
    """Push the trainer's weights; raise `WeightMismatch` unless the engine then holds them.

    The fingerprint of what the engine holds equals the trainer's bit for bit, so that a change too
    small to move a log-prob is seen as well. Cheap enough for every step.
    """
    engine.load_weights(trainer_side.pushed_tensors(), trainer_side.step)
    expected = fingerprint_tensors(
        (name, tensor.to(engine.dtype)) for name, tensor in trainer_side.named_tensors()
    )
    found = engine.fingerprint()
    if found != expected:
        raise WeightMismatch(
            f"after the sync of step {trainer_side.step} the engine holds other weights than the "
            f"trainer (fingerprints {found[:12]} and {expected[:12]}); stop: its samples would not "
            "come from this policy"
        )


def verify_sync(
    engine: Engine, trainer_side: TrainerSide, tolerance: float = 1e-4, length: int = PROBE_TOKENS
) -> None:
    """`push_weights`, then raise `WeightMismatch` unless every worker computes with them.

    The first `length` tokens after each probe prompt, drawn at temperature 1 with fixed seeds, must
    have the log-probs that the trainer gives them, within `tolerance` nats (1e-4 suits float32).
    This sees what a fingerprint cannot: a stale prefix cache, a wrong slice of the vocabulary, a
    broken kernel. Unlikely tokens show an error that greedy ones would hide, hence sampled probes.
    """
    push_weights(engine, trainer_side)
    prompts = trainer_side.probe_prompts
    expected: dict[bytes, Tensor] = {}  # by tokens: workers mostly draw the same
    for name, probes in engine.probe(prompts, length).items():
        drawn = probes.completion_ids
        given = drawn.shape, probes.behaviour_logprobs.shape
        if given != 2 * ((len(prompts), length),):
            told = " and ".join(str(list(shape)) for shape in given)
            raise WeightMismatch(
                f"after the sync of step {trainer_side.step} {name} gave probe tokens and "
                f"log-probs of shapes {told} instead of {[len(prompts), length]}; stop: it does "
                "not do as it is told"
            )
        if (key := drawn.numpy().tobytes()) not in expected:
            # Whole pictures one by one: logits are of the whole vocabulary.
            size = len(prompts) if length <= PROBE_TOKENS else 1
            parts = [slice(i, i + size) for i in range(0, len(prompts), size)]
            expected[key] = torch.cat(
                [trainer_side.completion_logprobs(prompts[rows], drawn[rows]) for rows in parts]
            )
        distances = (expected[key] - probes.behaviour_logprobs).abs().amax(1).tolist()
        for index, distance in enumerate(distances):
            if not distance <= tolerance:  # also true of NaN
                raise WeightMismatch(
                    f"after the sync of step {trainer_side.step} {name}'s log-probs of probe "
                    f"{index} differ from the trainer's by {distance:.2e} nats (allowed: "
                    f"{tolerance:.0e}); stop: its samples would not come from this policy"
                )
