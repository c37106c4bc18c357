"""Flow matching with the SANA head: the training loss and the Euler sampler."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from policy.denoiser import Denoiser

TRAIN_TIMESTEPS = 1000


def flow_matching_loss(
    head: SanaTransformer2DModel,
    latents: Tensor,
    conditions: Tensor,
    noise: Tensor,
    time: Tensor,
    reference_latents: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error of the predicted velocity (spec section 1.5).

    latents, noise: [B, C, S, S], latents already multiplied by the scaling factor;
    conditions: [B, R, width]; time: [B] in (0, 1], 1 = pure noise. The velocity is noise - latents.
    With `reference_latents` [B, C, S, S] the head sees them in noise space; the loss is over the
    target alone.
    """
    sigma = time.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    velocity = head(
        _beside(noisy, reference_latents),
        conditions,
        timestep=time * TRAIN_TIMESTEPS,
        return_dict=False,
    )[0][..., : noisy.shape[-1]]
    return F.mse_loss(velocity.float(), (noise - latents).float())


def sample_latents(
    head: SanaTransformer2DModel,
    scheduler_config: dict[str, object],
    conditions: Tensor,
    null_conditions: Tensor,
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    reference_latents: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Integrate from `noise` [B, C, S, S] to latents with Euler steps.

    Conditions [B, R, width] and the null branch [1, R, width] are computed once by the caller, and
    what the head makes of them once by the denoiser; guidance 1 leaves the null branch out, and so
    do steps whose noise level (sigma, after the scheduler's shift; 1 = pure noise) lies outside of
    `guidance_interval` (Kynkaanniemi et al., 2024, arXiv 2404.07724; both ends are inside).
    `reference_latents` [B, C, S, S] are seen in noise space by both branches. `compiled` steps are
    those of torch.compile, equal within rounding; their first call takes its time. A fresh
    scheduler per call keeps training and sampling from sharing state.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    denoiser = Denoiser(head, conditions, None if guidance == 1.0 else null_conditions)
    velocities = _compiled() if compiled else Denoiser.velocity
    latents = noise
    width = noise.shape[-1]
    low, high = guidance_interval
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        noisy = _beside(latents, reference_latents)
        # The scheduler's float32 would miss an end such as 0.9.
        guided = low <= round(sigma, 6) <= high
        velocity, null = velocities(denoiser, noisy, timestep, guided)
        if null is not None:
            velocity, null = velocity.float(), null.float()
            velocity = null + guidance * (velocity - null)
        velocity = velocity[..., :width].to(latents.dtype)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    return latents


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the denoiser's step as torch compiles it: one for all calls, and all their shapes."""
    return torch.compile(Denoiser.velocity)


def _beside(noisy: Tensor, reference_latents: Tensor | None) -> Tensor:
    """Put the reference on the right of the noisy latents."""
    return noisy if reference_latents is None else torch.cat([noisy, reference_latents], dim=-1)
