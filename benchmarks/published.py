"""The published way of a GRPO step, written from its specification, to be compared with.

Sampling is `generate` with the library's dynamic cache over the whole vocabulary; a second forward
pass without mask keeps the hidden states of all layers; the connector and the null branch run in
each of 30 Euler steps with guidance 2; rewards are called in the trainer; log-probs are a softmax
over the whole vocabulary. It is spared the truncation of its sampling (top-k, top-p) and the second
model for the KL term, which cost time and which ours does not use either.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from benchmarks.timing import clock
from policy import Policy
from policy.policy import to_images
from rl.trl_release import GRPOConfig, GRPOTrainer

STEPS, GUIDANCE = 30, 2.0

Reward = Callable[[Sequence[Image.Image], Sequence[Mapping[str, Any]]], list[float]]


@torch.no_grad()
def generate(policy: Policy, prompts: Sequence[str]) -> tuple[Tensor, Tensor, int]:
    """Return ids [B, T + N] of left-padded prompts and their completions, the mask, and T."""
    texts = [policy.prompt_text(prompt) for prompt in prompts]
    given = policy.tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    ids = policy.ar.generate(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=policy.config.num_tokens,
        pad_token_id=policy.config.pad_id,
    )
    width = given["input_ids"].shape[1]
    mask = torch.cat([given["attention_mask"], torch.ones_like(ids[:, width:])], 1)
    return ids, mask, width


@torch.no_grad()
def hidden_states(policy: Policy, ids: Tensor) -> Tensor:
    """Return rows [B, 1 + N, H] after `<im_start>`, of a pass that keeps all layers."""
    every = policy.ar.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    hidden, rows = every[-1], 1 + policy.config.num_tokens
    starts = (ids == policy.config.im_start_id).int().argmax(1) + 1
    return torch.stack(
        [row[start : start + rows] for row, start in zip(hidden, starts.tolist(), strict=True)]
    )


def decode(
    policy: Policy, hidden: Tensor, noise: Tensor, steps: int = STEPS, guidance: float = GUIDANCE
) -> Tensor:
    """Return pictures [B, 3, H, W] in [0, 1]: the connector is called in every Euler step."""
    both = torch.cat([torch.zeros_like(hidden), hidden])
    return guided_loop(policy, lambda: policy.connector(both), noise, steps, guidance)


@torch.no_grad()
def guided_loop(
    policy: Policy, conditions: Callable[[], Tensor], noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Return pictures [B, 3, H, W] in [0, 1] by the loop of diffusers' pipelines.

    `conditions` gives each Euler step the rows of the null branch and then those of the pictures.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(policy.scheduler_config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    latents = noise
    for timestep in scheduler.timesteps:
        twice = torch.cat([latents, latents])
        velocity = policy.diffusion(
            twice,
            encoder_hidden_states=conditions(),
            timestep=timestep.expand(len(twice)),
            return_dict=False,
        )[0]
        null, conditioned = velocity.chunk(2)
        velocity = null + guidance * (conditioned - null)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    pixels = policy.vae.decode(latents / policy.vae.config.scaling_factor).sample
    return (pixels / 2 + 0.5).clamp(0, 1)


def full_vocabulary_logprobs(
    model: Any, ids: Tensor, mask: Tensor, count: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies [B, count] of the last tokens, over the whole vocabulary."""
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=count + 1).logits
    logits = logits[:, :-1] / temperature
    logprobs = selective_log_softmax(logits, ids[:, -count:])
    with torch.no_grad():
        entropies = entropy_from_logits(logits)
    return logprobs, entropies


class PublishedTrainer(GRPOTrainer):
    """TRL's trainer with the changes that the published code makes to it.

    `seconds` holds the stages of the last rollout.
    """

    def __init__(
        self,
        policy: Policy,
        args: GRPOConfig,
        records: Sequence[Mapping[str, Any]],
        reward: Reward,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.policy = policy
        self.seconds: dict[str, float] = {}

        def judged(prompts: Any, images: Any, place: Any, **_: Any) -> list[float]:
            started = clock()
            values = reward(images, [records[i]["metadata"] for i in place])
            self.seconds["reward"] = clock() - started
            return values

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model=policy.ar,
                reward_funcs=[judged],
                args=args,
                train_dataset=Dataset.from_list(
                    [{"prompt": record["prompt"], "place": i} for i, record in enumerate(records)]
                ),
                processing_class=policy.tokenizer,
                callbacks=list(callbacks),
                rollout_func=lambda prompts, trainer: trainer.rollout(prompts),
            )
        self.remove_callback(PrinterCallback)

    def rollout(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Sample, pass again and decode, as one batch."""
        policy, laps = self.policy, [clock()]
        policy.ar.eval()
        ids, mask, width = generate(policy, prompts)
        laps.append(clock())
        hidden = hidden_states(policy, ids)
        laps.append(clock())
        config = policy.config
        noise = torch.randn(
            len(ids), config.latent_channels, config.latent_size, config.latent_size
        )
        images = to_images(decode(policy, hidden, noise))
        policy.ar.train()
        laps.append(clock())
        stages = ("rollout", "score", "render")
        self.seconds |= {name: laps[i + 1] - laps[i] for i, name in enumerate(stages)}
        rows = zip(ids[:, :width], mask[:, :width].bool(), strict=True)
        return {
            "prompt_ids": [row[real].tolist() for row, real in rows],
            "completion_ids": ids[:, width:].tolist(),
            "logprobs": None,
            "images": images,
        }

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, None]:
        size = batch_size or len(input_ids)
        pieces = [
            full_vocabulary_logprobs(
                model,
                input_ids[start : start + size],
                attention_mask[start : start + size],
                logits_to_keep,
                self.temperature,
            )
            for start in range(0, len(input_ids), size)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies), None
