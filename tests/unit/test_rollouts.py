"""One step's rollouts: whose seed decides what, and that all log-probs are of one distribution."""

import numpy as np
import pytest
import torch

from common.seeds import counter_seed
from rl.rollouts import Sampler
from rollout.decode import Decode
from rollout.engine import Sampling
from rollout.transformers_engine import TransformersEngine

PROMPTS = ["a photo of a red circle", "x", 'a sign that says "CAB"']
GROUP = 3


def engine_of(policy) -> TransformersEngine:
    config = policy.config
    return TransformersEngine(
        policy.ar,
        config.image_start_id,
        config.num_image_tokens,
        config.num_tokens,
        config.pad_id,
    )


def sampler_of(
    policy, shared=True, sampling=None, engine=None, run_seed=0, micro_batch=None, waves=1
) -> Sampler:
    return Sampler(
        policy,
        engine or engine_of(policy),
        sampling or Sampling(),
        Decode(steps=2, guidance=1.0, shared_noise=shared),
        run_seed,
        micro_batch,
        waves,
    )


def pixels(rollout) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in rollout.images])


def noises(policy, monkeypatch) -> list[torch.Tensor]:
    """Collect the initial noise of every call of `render`."""
    seen, render = [], policy.render

    def watched(hidden, *, noise=None, **options):
        seen.append(noise)
        return render(hidden, noise=noise, **options)

    monkeypatch.setattr(policy, "render", watched)
    return seen


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.6), Sampling(temperature=1.7)]
)
def test_the_trainer_s_logprobs_are_the_behaviour_logprobs(policy, sampling):
    rollout = sampler_of(policy, sampling=sampling)(PROMPTS, GROUP, 0)
    assert rollout.logprobs.shape == (9, policy.config.num_tokens)
    torch.testing.assert_close(rollout.logprobs, rollout.behaviour_logprobs, atol=1e-5, rtol=0)
    assert rollout.logprobs.std() > 0.1


def test_they_are_still_equal_in_training_mode_with_adapters_and_dropout(policy):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(policy.ar, LoraConfig(target_modules=["v_proj"], lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.train()
    rollout = sampler_of(policy)(PROMPTS, GROUP, 0)
    torch.testing.assert_close(rollout.logprobs, rollout.behaviour_logprobs, atol=1e-5, rtol=0)


def test_truncation_is_in_the_behaviour_logprobs_alone(policy):
    # The importance ratio corrects for what top-k and top-p cut off.
    rollout = sampler_of(policy, sampling=Sampling(top_k=4))(PROMPTS, GROUP, 0)
    assert (rollout.logprobs < rollout.behaviour_logprobs - 1e-3).all()


def test_members_of_a_group_share_their_noise(policy, monkeypatch):
    seen = noises(policy, monkeypatch)
    sampler_of(policy, shared=True)(PROMPTS, GROUP, 7)
    groups = seen[0].view(3, GROUP, -1)
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len({tuple(group[0].tolist()) for group in groups}) == 3


def test_per_sample_noise_is_everyone_s_own(policy, monkeypatch):
    seen = noises(policy, monkeypatch)
    sampler_of(policy, shared=False)(PROMPTS, GROUP, 7)
    assert len({tuple(row.flatten().tolist()) for row in seen[0]}) == 9


def test_noise_changes_with_the_step_and_the_run(policy, monkeypatch):
    seen = noises(policy, monkeypatch)
    for run_seed, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        sampler_of(policy, run_seed=run_seed)(PROMPTS[:1], 2, step)
    first, other_step, other_run, again = (noise[0] for noise in seen)
    assert torch.equal(first, again)
    assert not torch.equal(first, other_step)
    assert not torch.equal(first, other_run)


def test_seeds_are_counters_of_run_step_group_and_member(policy):
    asked = []

    class Watched:
        def generate(self, prompt_ids, n, sampling, seeds):
            asked.append(list(seeds))
            return engine_of(policy).generate(prompt_ids, n, sampling, seeds)

    sampler_of(policy, engine=Watched(), run_seed=5)(PROMPTS, GROUP, 11, 0)
    places = [(group, member) for group in range(3) for member in range(GROUP)]
    assert asked == [[counter_seed(5, "tokens", 11, 0, *place) for place in places]]


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(policy):
    whole = sampler_of(policy)(PROMPTS, GROUP, 3)
    part = sampler_of(policy)(
        [PROMPTS[0], "something else that is much longer than that"], GROUP, 3
    )
    assert torch.equal(whole.completion_ids[:GROUP], part.completion_ids[:GROUP])
    assert np.abs(pixels(whole)[:GROUP] - pixels(part)[:GROUP]).max() <= 1
    torch.testing.assert_close(whole.logprobs[:GROUP], part.logprobs[:GROUP], atol=1e-5, rtol=0)
    assert not torch.equal(whole.completion_ids[:GROUP], whole.completion_ids[GROUP : 2 * GROUP])


def test_a_rollout_repeats_itself_and_draws_nothing_from_the_global_generator(policy):
    state = torch.get_rng_state()
    first, again = (sampler_of(policy)(PROMPTS, GROUP, 3) for _ in range(2))
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert np.array_equal(pixels(first), pixels(again))
    assert torch.equal(state, torch.get_rng_state())
    assert len({tuple(row.tolist()) for row in first.completion_ids}) == 9


def test_pictures_are_the_rendered_hidden_states_of_their_own_tokens(policy, monkeypatch):
    seen = noises(policy, monkeypatch)
    rollout = sampler_of(policy)(PROMPTS, GROUP, 3)
    for number in (0, 4, 8):
        ids = rollout.prompt_ids[number] + rollout.completion_ids[number].tolist()
        assert rollout.prompt_ids[number] == policy.prompt_ids([PROMPTS[number // GROUP]])[0]
        with torch.no_grad():
            hidden = policy.ar.model(torch.tensor([ids])).last_hidden_state[:, -37:]
        picture = policy.render(hidden, noise=seen[0][number : number + 1], steps=2, guidance=1.0)
        expected = (picture[0] * 255).permute(1, 2, 0).numpy()
        assert np.abs(pixels(rollout)[number] - expected).max() < 1.1


def test_pictures_do_not_depend_on_the_micro_batch(policy, monkeypatch):
    whole = sampler_of(policy)(PROMPTS, GROUP, 3)
    seen = noises(policy, monkeypatch)
    pieces = sampler_of(policy, micro_batch=4)(PROMPTS, GROUP, 3)
    assert [len(noise) for noise in seen] == [4, 4, 1]
    assert torch.equal(pieces.completion_ids, whole.completion_ids)
    torch.testing.assert_close(pieces.logprobs, whole.logprobs, atol=1e-5, rtol=0)
    assert np.abs(pixels(pieces) - pixels(whole)).max() <= 1
