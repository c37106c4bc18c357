"""The joint loss: cross-entropy on image tokens plus flow matching of the diffusion head.

Source: spec section 1.5. Both losses come from one pass of the language model: its logits predict
the image tokens, its hidden states at `<S0>` and the image tokens condition the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policy.diffusion import flow_matching_loss
from policy.policy import Policy

PARTS = ("cross_entropy", "flow_matching")


@dataclass(frozen=True)
class Draws:
    """What flow matching draws at random."""

    hidden_noise: Tensor | None
    """[B, 1 + N, H], in units of the hidden states' standard deviation; None = not wanted."""
    kept: Tensor
    """bool [B]: false where the sample loses its condition."""
    time: Tensor
    """[B] in [0, 1)."""
    noise: Tensor
    """[B, C, S, S]."""


def draw_per_batch(hidden: Tensor, latents: Tensor, dropout: float, noisy: bool) -> Draws:
    """Draw from torch's global generator."""
    batch, device = len(hidden), hidden.device
    return Draws(
        torch.randn_like(hidden) if noisy else None,
        torch.rand(batch, 1, 1, device=device).flatten() >= dropout,
        torch.rand(batch, device=device),
        torch.randn_like(latents),
    )


def draw_per_sample(
    seeds: Sequence[int], hidden: Tensor, latents: Tensor, dropout: float, noisy: bool
) -> Draws:
    """Draw each row from its own seed, on the CPU: the same on any device, in any batch."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(2, generator=generator)
        noise = torch.randn(latents.shape[1:], generator=generator)
        extra = torch.randn(hidden.shape[1:], generator=generator) if noisy else torch.empty(0)
        rows.append((extra, uniform[0] >= dropout, uniform[1], noise))
    columns = zip(*rows, strict=True)
    extra, kept, time, noise = (torch.stack(column).to(hidden.device) for column in columns)
    return Draws(extra.to(hidden.dtype) if noisy else None, kept, time, noise.to(latents.dtype))


class JointLoss(nn.Module):
    """The loss of a batch: weights times cross-entropy (nats per token) and flow matching (MSE).

    Cross-entropy is taken over the image rows of the vocabulary, the only legal tokens.
    With the policy's switch `tail_slice` the head is conditioned on the last rows of the batch, as
    published. `condition_dropout` gives a sample the null condition of sampling; `hidden_noise` (in
    units of their standard deviation) is added to the hidden states, so that the head tolerates the
    drift that RL causes. With `bf16` products are computed in bfloat16, whatever the weights are.

    Only the parts that can learn are registered. The image tokenizer and the autoencoder make the
    batches and stay outside, so that nobody shards or averages them.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        cross_entropy: float,
        flow_matching: float,
        condition_dropout: float = 0.1,
        hidden_noise: float = 0.0,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.ar = policy.ar
        self.connector = policy.connector
        self.diffusion = policy.diffusion
        self.reference_connector = policy.reference_connector
        self._unregistered = [policy]
        self.weights = {"cross_entropy": cross_entropy, "flow_matching": flow_matching}
        self.condition_dropout = condition_dropout
        self.hidden_noise = hidden_noise
        self.bf16 = bf16

    @property
    def policy(self) -> Policy:
        """The policy whose parts learn."""
        return self._unregistered[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        latents: Tensor | None = None,
        reference_latents: Tensor | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Return {"loss": scalar} and the losses that have a weight, each detached.

        input_ids, attention_mask int64 [B, T] as `rl.corpus.Collator` makes them; latents and
        reference_latents [B, C, S, S]; without seeds, torch's generator draws.
        """
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self._hidden_states(input_ids, attention_mask)
            places = self.policy.image_places(input_ids)
            rows = hidden.take_along_dim(places[..., None], dim=1)
            parts = {}
            if self.weights["cross_entropy"]:
                tokens = input_ids.take_along_dim(places[:, 1:], dim=1)
                parts["cross_entropy"] = self._cross_entropy(rows, tokens)
            if self.weights["flow_matching"]:
                assert latents is not None
                if "tail_slice" in self.policy.config.compatibility:
                    rows = hidden[:, -rows.shape[1] :]
                parts["flow_matching"] = self._flow_matching(
                    rows, latents, reference_latents, seeds
                )
        loss = torch.zeros((), device=hidden.device)
        for name, value in parts.items():
            loss = loss + self.weights[name] * value
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def _hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, T, H], without a graph if the language model does not learn."""
        learns = any(p.requires_grad for p in self.ar.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return self.policy.hidden_states(input_ids, attention_mask)

    def _cross_entropy(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Of the N image tokens [B, N], each predicted by the row before it."""
        config = self.policy.config
        first = config.image_start_id
        head = self.ar.lm_head.weight[first : first + config.num_image_tokens]
        logits = F.linear(rows[:, :-1], head)
        return F.cross_entropy(logits.flatten(0, 1).float(), (tokens - first).flatten())

    def _flow_matching(
        self,
        hidden: Tensor,
        latents: Tensor,
        reference_latents: Tensor | None,
        seeds: Sequence[int] | None,
    ) -> Tensor:
        policy, routes = self.policy, self.policy.config.routes
        wanted = (latents, self.condition_dropout, bool(self.hidden_noise))
        if seeds is None:
            draws, spread = draw_per_batch(hidden, *wanted), hidden.std()
        else:
            draws = draw_per_sample(seeds, hidden, *wanted)
            spread = hidden.std(dim=(1, 2), keepdim=True)
        if draws.hidden_noise is not None:
            hidden = hidden + self.hidden_noise * spread * draws.hidden_noise
        attended = reference_latents if "cross_attention" in routes else None
        return flow_matching_loss(
            policy.diffusion,
            latents,
            policy.conditions(hidden, reference_latents=attended, kept=draws.kept),
            draws.noise,
            draws.time.clamp(min=1e-3),
            reference_latents if "noise_space" in routes else None,
        )
