"""Flow matching with the SANA head: the training loss and the Euler sampler."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

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
    velocity = _velocity(head, noisy, conditions, time * TRAIN_TIMESTEPS, reference_latents)
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
    reference_latents: Tensor | None = None,
) -> Tensor:
    """Integrate from `noise` [B, C, S, S] to latents with Euler steps.

    Conditions [B, R, width] and the null branch [1, R, width] are computed once by the caller;
    guidance 1 leaves the null branch out. `reference_latents` [B, C, S, S] are seen in noise space
    by both branches. A fresh scheduler per call keeps training and sampling from sharing state.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    guided = guidance != 1.0
    if guided:
        conditions = torch.cat([null_conditions.expand_as(conditions), conditions])
        if reference_latents is not None:
            reference_latents = torch.cat([reference_latents, reference_latents])
    latents = noise
    for timestep in scheduler.timesteps:
        batch = torch.cat([latents, latents]) if guided else latents
        velocity = _velocity(
            head, batch, conditions, timestep.expand(len(batch)), reference_latents
        )
        if guided:
            null, conditioned = velocity.float().chunk(2)
            velocity = null + guidance * (conditioned - null)
        latents = scheduler.step(velocity.to(latents.dtype), timestep, latents).prev_sample
    return latents


def _velocity(
    head: SanaTransformer2DModel,
    noisy: Tensor,
    conditions: Tensor,
    timestep: Tensor,
    reference_latents: Tensor | None,
) -> Tensor:
    """Predict the velocity [B, C, S, S]; a reference stands on the right of the noisy latents."""
    width = noisy.shape[-1]
    if reference_latents is not None:
        noisy = torch.cat([noisy, reference_latents], dim=-1)
    velocity: Tensor = head(noisy, conditions, timestep=timestep, return_dict=False)[0]
    return velocity[..., :width]
