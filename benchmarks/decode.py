"""Decode: `Policy.render` against the loop that diffusers' pipelines write, with equal settings.

    python -m benchmarks.decode [--turns 5]

144 pictures of the shipped tiny policy, 12 to a prompt, 6 Euler steps with guidance 1.5. The loop
is that of diffusers' `SanaPipeline` for given condition rows, computed once (the published way
computes them in each step: see `benchmarks.step`), and both decode with the same autoencoder.
"""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benchmarks.timing import Ratio, main, take_turns
from policy import Policy, base_path

PICTURES, STEPS, GUIDANCE = 144, 6, 1.5


@torch.no_grad()
def pipeline_loop(policy: Policy, hidden: Tensor, noise: Tensor) -> Tensor:
    """Return pictures [B, 3, H, W] in [0, 1]."""
    null = policy.null_conditions().expand(len(hidden), -1, -1)
    conditions = torch.cat([null, policy.conditions(hidden)])
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(policy.scheduler_config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / STEPS, STEPS).tolist())
    latents = noise
    for timestep in scheduler.timesteps:
        twice = torch.cat([latents, latents])
        velocity = policy.diffusion(
            twice,
            encoder_hidden_states=conditions,
            timestep=timestep.expand(len(twice)),
            return_dict=False,
        )[0]
        without, given = velocity.chunk(2)
        velocity = without + GUIDANCE * (given - without)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    pixels = policy.vae.decode(latents / policy.vae.config.scaling_factor).sample
    return (pixels / 2 + 0.5).clamp(0, 1)


def ratios(turns: int) -> list[Ratio]:
    """Return the ratio of the two loops, whose pictures have to agree."""
    policy = Policy.from_pretrained(base_path())
    rows = 1 + policy.config.num_tokens
    torch.manual_seed(0)
    hidden = torch.randn(PICTURES, rows, policy.ar.config.hidden_size)
    noise = policy.noise([row // 12 for row in range(PICTURES)])

    def ours() -> Tensor:
        return policy.render(hidden, noise=noise, steps=STEPS, guidance=GUIDANCE)

    torch.testing.assert_close(ours(), pipeline_loop(policy, hidden, noise), atol=1e-4, rtol=0)
    times = take_turns({"loop": lambda: pipeline_loop(policy, hidden, noise), "ours": ours}, turns)
    return [times.ratio("decode: diffusers' own loop", "loop", "ours")]


if __name__ == "__main__":
    main(ratios, __doc__)
