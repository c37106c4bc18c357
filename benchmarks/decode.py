"""Decode: `Policy.render` against the loop that diffusers' pipelines write, with equal settings.

    python -m benchmarks.decode [--turns 5]

144 pictures of the shipped tiny policy, 12 to a prompt, 6 Euler steps with guidance 1.5. The loop
is that of diffusers' `SanaPipeline` for given condition rows, computed once (the published way
computes them in each step: see `benchmarks.step`), and both decode with the same autoencoder.
"""

import torch
from torch import Tensor

from benchmarks.published import guided_loop
from benchmarks.timing import Ratio, main, take_turns
from data.scenes import scene_prompts
from policy import Policy, base_path
from policy.sampling import ImageTokenSampler, Sampling

PICTURES, GROUP, STEPS, GUIDANCE = 144, 12, 6, 1.5


@torch.no_grad()
def pipeline_loop(policy: Policy, hidden: Tensor, noise: Tensor) -> Tensor:
    """Return pictures [B, 3, H, W] in [0, 1]."""
    null = policy.null_conditions().expand(len(hidden), -1, -1)
    conditions = torch.cat([null, policy.conditions(hidden)])
    return guided_loop(policy, lambda: conditions, noise, STEPS, GUIDANCE)


def sampled(policy: Policy) -> Tensor:
    """Return the hidden states [PICTURES, 1 + N, H] of pictures that the policy draws."""
    config = policy.config
    records = scene_prompts("train", n=PICTURES // GROUP)
    ids = policy.prompt_ids([record["prompt"] for record in records])
    sampler = ImageTokenSampler(
        policy.ar, config.image_start_id, config.num_image_tokens, config.num_tokens, config.pad_id
    )
    tokens, _ = sampler.sample(ids, GROUP, Sampling(), list(range(PICTURES)))
    with torch.no_grad():
        return policy.condition_rows([row for row in ids for _ in range(GROUP)], tokens)


def ratios(turns: int) -> list[Ratio]:
    """Return the ratio of the two loops, whose pictures have to agree."""
    policy = Policy.from_pretrained(base_path())
    hidden = sampled(policy)
    noise = policy.noise([row // GROUP for row in range(PICTURES)])

    def ours() -> Tensor:
        return policy.render(hidden, noise=noise, steps=STEPS, guidance=GUIDANCE)

    torch.testing.assert_close(ours(), pipeline_loop(policy, hidden, noise), atol=1e-4, rtol=0)
    times = take_turns({"loop": lambda: pipeline_loop(policy, hidden, noise), "ours": ours}, turns)
    return [times.ratio("decode: diffusers' own loop", "loop", "ours")]


if __name__ == "__main__":
    main(ratios, __doc__)
