"""What the published code is known to get wrong, right here by default (spec sections 1.5 to 1.9).

Prompt injection is in test_policy_text.py, seeded noise in test_policy.py, padding that reaches
other rows in both and in tests/parity.
"""

from dataclasses import replace

import pytest
import torch
from PIL import ImageChops
from published_checkpoint import edit_policy
from torch.nn import functional as F

from common.errors import DataError, PolicyError
from policy import Policy
from policy.connector import new_reference_connector
from policy.diffusion import flow_matching_loss
from policy.sampling import ImageTokenSampler, Sampling
from rl.corpus import Collator
from rl.joint_loss import JointLoss

BOTH = ("cross_attention", "noise_space")


@pytest.fixture(scope="module")
def shared() -> Policy:
    return edit_policy()


@pytest.fixture
def policy(shared) -> Policy:
    """Nothing in it is changed but its description."""
    config = shared.config
    yield shared
    shared.config = config


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hidden_rows(policy: Policy, batch: int) -> torch.Tensor:
    return randn(batch, 1 + policy.config.num_tokens, policy.ar.config.hidden_size)


def picture(height: int = 48, width: int = 48, seed: int = 3) -> torch.Tensor:
    return randn(1, 3, height, width, seed=seed).clamp(-1, 1)


def latents(policy: Policy, batch: int, seed: int = 0) -> torch.Tensor:
    config = policy.config
    return randn(batch, config.latent_channels, config.latent_size, config.latent_size, seed=seed)


# --- tokens --------------------------------------------------------------------------------------


def test_only_image_tokens_are_sampled_however_probable_text_is():
    policy = edit_policy()
    config = policy.config
    with torch.no_grad():
        policy.ar.lm_head.weight[: config.image_start_id] *= 100
    sampler = ImageTokenSampler(
        policy.ar, config.image_start_id, config.num_image_tokens, config.num_tokens, config.pad_id
    )
    tokens, _ = sampler.sample(policy.prompt_ids(["a"]), 20, Sampling(), range(20))
    assert tokens.shape == (20, config.num_tokens)
    assert tokens.min() >= config.image_start_id
    assert tokens.max() < config.image_start_id + config.num_image_tokens


def test_a_prompt_longer_than_the_context_is_refused(policy):
    room = policy.ar.config.max_position_embeddings - policy.config.num_tokens
    with pytest.raises(DataError, match=rf"room for {room} "):
        policy.prompt_ids(["a red circle", "red " * 600])


# --- the slice -----------------------------------------------------------------------------------


def padded_batch(policy: Policy, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two training rows of different length, and where their `<S0>` stand."""
    config = policy.config
    tokens = range(config.image_start_id, config.image_start_id + config.num_tokens)
    rows = [
        [*prompt, *tokens, config.im_end_id, config.eos_id]
        for prompt in policy.prompt_ids(["a", "a photo of a red circle"])
    ]
    width = max(map(len, rows))
    fill = [[config.pad_id] * (width - len(row)) for row in rows]
    ids = [f + r if side == "left" else r + f for f, r in zip(fill, rows, strict=True)]
    starts = [(len(f) if side == "left" else 0) + r.index(config.scale_start_id)
              for f, r in zip(fill, rows, strict=True)]  # fmt: skip
    return torch.tensor(ids), torch.tensor(starts)


@pytest.mark.parametrize("side", ["left", "right"])
def test_conditions_are_s0_and_the_image_tokens_wherever_the_padding_is(side, policy):
    ids, starts = padded_batch(policy, side)
    rows = 1 + policy.config.num_tokens
    found = policy.image_places(ids)
    assert found.tolist() == [[*range(start, start + rows)] for start in starts.tolist()]


def test_a_sequence_without_its_picture_is_refused(policy):
    ids, _ = padded_batch(policy, "right")
    for broken in (ids[:, :-10], ids.masked_fill(ids == policy.config.im_start_id, 0)):
        with pytest.raises(PolicyError, match="no <im_start>"):
            policy.image_places(broken)


def training_batch(policy: Policy) -> dict[str, torch.Tensor]:
    """What the collator makes of two captions of different length."""
    prompts = policy.prompt_ids(["a", "a photo of a red circle"])
    codes = torch.arange(2 * policy.config.num_tokens).view(2, -1) % policy.config.num_image_tokens
    return Collator(policy).sequences(prompts, codes)


def seen_by_the_connector(
    policy: Policy, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """Run the joint loss; return what the head is conditioned on and the cross-entropy."""
    joint = JointLoss(policy, cross_entropy=1, flow_matching=1, condition_dropout=0)
    seen = []
    hook = policy.connector.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        parts = joint(**batch, latents=latents(policy, 2), reference_latents=latents(policy, 2, 1))
    hook.remove()
    return seen[0], float(parts["cross_entropy"])


def test_training_conditions_on_the_picture_and_with_the_switch_on_the_tail_as_published(policy):
    batch, rows = training_batch(policy), 1 + policy.config.num_tokens
    assert batch["attention_mask"][0, 0] == 0  # padding on the left, the picture at the end
    right, entropy = seen_by_the_connector(policy, batch)
    ids, starts = padded_batch(policy, "right")
    policy.config = replace(policy.config, compatibility=("tail_slice",))
    newline = policy.tokenizer("\n", add_special_tokens=False)["input_ids"]
    legacy = training_batch(policy)
    for row, start, prompt in zip(legacy["input_ids"], starts, ids, strict=True):
        end = int(start) + rows
        assert row[: int(start) + 1].tolist() == prompt[: int(start) + 1].tolist()
        ending = [policy.config.im_end_id, policy.config.eos_id, *newline]
        assert row[end : end + len(ending)].tolist() == ending
    tail, legacy_entropy = seen_by_the_connector(policy, legacy)
    # The published call: right padding, a mask, positions from the left.
    with torch.no_grad():
        hidden = policy.ar.model(**legacy, use_cache=False).last_hidden_state
    torch.testing.assert_close(tail, hidden[:, -rows:], atol=1e-5, rtol=0)
    for number, start in enumerate(starts.tolist()):
        there = hidden[number, start : start + rows]
        torch.testing.assert_close(right[number], there, atol=1e-5, rtol=0)
    assert float((tail - right).abs().max()) > 0.1
    assert legacy_entropy == pytest.approx(entropy, abs=1e-5)  # it is of the picture all the same


def test_an_unknown_switch_is_refused(policy_folder, tmp_path):
    config = Policy.from_pretrained(policy_folder).config
    replace(config, compatibility=("tail_slize",)).save(tmp_path)
    with pytest.raises(PolicyError, match="tail_slize"):
        type(config).load(tmp_path)


# --- the null condition --------------------------------------------------------------------------


def test_dropout_in_training_is_the_null_condition_of_sampling(policy):
    hidden, reference = hidden_rows(policy, 3), latents(policy, 3)
    kept = torch.tensor([True, False, True])
    with torch.no_grad():
        found = policy.conditions(hidden, reference_latents=reference, kept=kept)
        whole = policy.conditions(hidden, reference_latents=reference)
        null = policy.null_conditions(reference=True)
        zeros = policy.connector(torch.zeros_like(hidden[:1]))
    rows = 1 + policy.config.num_tokens
    # As published: zeros before the connector for hidden states, after it for the reference.
    torch.testing.assert_close(null[:, :rows], zeros)
    assert not null[:, rows:].any()
    torch.testing.assert_close(found[1:2], null)
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])
    alone = policy.conditions(hidden, kept=kept)
    torch.testing.assert_close(alone[1:2], policy.null_conditions())


def test_each_reference_row_is_its_own_cell_of_its_own_sample(policy):
    """The published reshape takes a batch for one long reference."""
    reference = latents(policy, 2)
    size, rows = policy.config.latent_size, 1 + policy.config.num_tokens
    with torch.no_grad():
        found = policy.conditions(hidden_rows(policy, 2), reference_latents=reference)
        cell = policy.reference_connector(reference[1, :, 2, 4])
    assert found.shape == (2, rows + size * size, policy.connector.width)
    torch.testing.assert_close(found[1, rows + 2 * size + 4], cell)


# --- decoding ------------------------------------------------------------------------------------


def euler(policy: Policy, hidden, noise, reference, routes, steps, guidance) -> torch.Tensor:
    """Editing written out: spec section 1.9 (a) and (b), with guidance."""
    connected = policy.connector(hidden), policy.connector(torch.zeros_like(hidden))
    if "cross_attention" in routes:
        rows = policy.reference_connector(reference.flatten(2).transpose(1, 2))
        connected = (torch.cat([connected[0], rows], 1),
                     torch.cat([connected[1], torch.zeros_like(rows)], 1))  # fmt: skip
    state, width = noise, noise.shape[-1]
    for step in range(steps):
        time = torch.full((len(noise),), 1000 * (1 - step / steps))
        seen = torch.cat([state, reference], -1) if "noise_space" in routes else state
        velocity, null = (
            policy.diffusion(seen, rows, timestep=time).sample[..., :width] for rows in connected
        )
        state = state - (null + guidance * (velocity - null)) / steps
    return (policy.vae.decode(state / policy.vae.config.scaling_factor).sample / 2 + 0.5).clamp(
        0, 1
    )


@pytest.mark.parametrize("routes", [(), BOTH[:1], BOTH[1:], BOTH])
def test_an_edit_is_the_euler_integration_with_the_reference(routes, policy):
    hidden, noise, reference = hidden_rows(policy, 2), policy.noise([1, 2]), picture()
    how = {"steps": 3, "guidance": 2.0}
    found = policy.render(hidden, noise=noise, references=reference, routes=routes, **how)
    with torch.no_grad():
        own = policy.encode_latents(reference).expand(2, -1, -1, -1)
        expected = euler(policy, hidden, noise, own, routes, **how)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    plain = policy.render(hidden, noise=noise, **how)
    assert ((found - plain).abs().max() > 1e-4) == bool(routes)
    if routes == BOTH:
        default = policy.render(hidden, noise=noise, references=reference, **how)
        assert torch.equal(default, found)


def test_routes_need_a_reference_and_a_name_that_is_known(policy):
    with pytest.raises(PolicyError, match="no reference pictures"):
        policy.render(hidden_rows(policy, 1), routes=BOTH)
    with pytest.raises(PolicyError, match="no route 'sideways'"):
        policy.render(hidden_rows(policy, 1), references=picture(), routes=("sideways",))


def test_cross_attention_without_its_connector_is_refused(policy_folder):
    policy = Policy.from_pretrained(policy_folder)
    with pytest.raises(PolicyError, match="no reference connector"):
        policy.render(hidden_rows(policy, 1), references=picture(), routes=BOTH[:1])


@pytest.mark.parametrize("steps", [1, 5])
def test_connectors_run_once_and_not_in_every_step(steps, policy):
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in (("ar", policy.connector), ("reference", policy.reference_connector))
    ]
    policy.render(hidden_rows(policy, 2), references=picture(), steps=steps, guidance=2.0)
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["ar", "ar", "reference"]  # the condition and the null branch


def test_sampling_and_training_share_no_scheduler_state(policy):
    hidden, target, noise = hidden_rows(policy, 2), latents(policy, 2), latents(policy, 2, 1)
    time = torch.tensor([0.3, 0.999])
    reference = latents(policy, 2, 2)

    def loss() -> torch.Tensor:
        conditions = policy.conditions(hidden)
        return flow_matching_loss(policy.diffusion, target, conditions, noise, time, reference)

    with torch.no_grad():
        before = loss()
        first = policy.render(hidden, noise=noise, steps=7)
        assert torch.equal(loss(), before)
        assert torch.equal(policy.render(hidden, noise=noise, steps=7), first)
        # The loss itself: the velocity of the target's half alone.
        sigma = time.view(-1, 1, 1, 1)
        noisy = torch.cat([(1 - sigma) * target + sigma * noise, reference], -1)
        predicted = policy.diffusion(noisy, policy.conditions(hidden), timestep=1000 * time).sample
        half = predicted[..., : target.shape[-1]]
    torch.testing.assert_close(before, F.mse_loss(half, noise - target))


# --- preprocessing -------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(48, 80), (90, 48)])
def test_codes_and_latents_describe_the_same_centre(height, width, policy):
    pixels = picture(height, width)
    top, left = (height - 48) // 2, (width - 48) // 2
    centre = pixels[..., top : top + 48, left : left + 48]
    assert torch.equal(policy.encode_images(pixels), policy.encode_images(centre))
    assert torch.equal(policy.encode_latents(pixels), policy.encode_latents(centre))
    policy.config = replace(policy.config, compatibility=("squashed_tokens",))
    squashed = F.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
    assert torch.equal(policy.encode_images(pixels), policy.encode_images(squashed))
    assert not torch.equal(policy.encode_images(pixels), policy.encode_images(centre))
    assert torch.equal(policy.encode_latents(pixels), policy.encode_latents(centre))


# --- prompts with references ---------------------------------------------------------------------


def test_an_instruction_carries_the_codes_of_its_references_and_cannot_forge_them(policy):
    config = policy.config
    codes = torch.arange(2 * 2 * config.num_tokens).view(2, 2, -1) % config.num_image_tokens
    texts = ["make <I5> red <image>", "{references}"]
    text = policy.prompt_text(texts[0], references=2)
    assert "Please edit these images according" in text
    assert text.endswith("<image><image><|im_end|>\n<|im_start|>assistant\n<im_start><S0>")
    assert "edit this image according" in policy.prompt_text("x", references=1)
    for row, ids in enumerate(policy.prompt_ids(texts, codes)):
        found = [i - config.image_start_id for i in ids if i >= config.image_start_id]
        assert found == codes[row].flatten().tolist()
        words = [i for i in ids if i < config.image_start_id]
        assert texts[row] in policy.tokenizer.decode(words, clean_up_tokenization_spaces=False)


def test_an_edited_picture_depends_on_its_reference_alone_and_not_on_the_batch(policy):
    how = {"steps": 2, "seeds": [1, 2]}
    references = torch.cat([picture(seed=1), picture(seed=2)])
    first = policy.generate(["a", "make it red"], references=references, **how)
    alone = policy.generate(["make it red"], references=references[1:], steps=2, seeds=[2])
    other = policy.generate(["a", "make it red"], references=references[:1], **how)
    difference = [
        max(high for _, high in ImageChops.difference(one, first[1]).getextrema())
        for one in (alone[0], other[1])
    ]
    assert difference[0] <= 1
    assert difference[1] > 1


def test_a_new_reference_connector_starts_almost_silent():
    connector = new_reference_connector(16, 64)
    assert not connector[0].bias.any()
    bound = 0.1 * (6 / (16 + 64)) ** 0.5  # xavier uniform with gain 0.1
    assert 0.9 * bound < float(connector[0].weight.abs().max()) <= bound
    assert float(connector[3].weight[0]) == pytest.approx(5.5**0.5)
