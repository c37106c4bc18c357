"""Flow matching with the SANA head: the training loss and the Euler sampler."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

TRAIN_TIMESTEPS = 1000


def flow_matching_loss(
    head: SanaTransformer2DModel, latents: Tensor, conditions: Tensor, noise: Tensor, time: Tensor
) -> Tensor:
    """Return the mean squared error of the predicted velocity (spec section 1.5).

    latents, noise: [B, C, S, S], latents already multiplied by the scaling factor;
    conditions: [B, R, width]; time: [B] in (0, 1], 1 = pure noise. The velocity is noise - latents.
    """
    sigma = time.view(-1, 1, 1, 1)
    noisy = (1 - sigma) * latents + sigma * noise
    velocity = head(noisy, conditions, timestep=time * TRAIN_TIMESTEPS, return_dict=False)[0]
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
) -> Tensor:
    """Integrate from `noise` [B, C, S, S] to latents with Euler steps.

    Conditions [B, R, width] and the null branch [1, R, width] are computed once by the caller;
    guidance 1 leaves the null branch out. A fresh scheduler per call keeps training and
    sampling from sharing state.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    guided = guidance != 1.0
    if guided:
        conditions = torch.cat([null_conditions.expand_as(conditions), conditions])
    latents = noise
    for timestep in scheduler.timesteps:
        batch = torch.cat([latents, latents]) if guided else latents
        velocity = head(batch, conditions, timestep=timestep.expand(len(batch)), return_dict=False)[
            0
        ]
        if guided:
            null, conditioned = velocity.float().chunk(2)
            velocity = null + guidance * (conditioned - null)
        latents = scheduler.step(velocity.to(latents.dtype), timestep, latents).prev_sample
    return latents
