"""Operations, counted by torch's own counter on the real modules: tiny ones, and the published
ones on the meta device."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from policy import Policy, base_path
from policy.anatomy import read_anatomy
from policy.published import published_anatomy, published_modules
from policy.sampling import ImageTokenSampler, Sampling
from recipes import load_recipe
from recipes.schema_grpo import LoraSection
from rl import flops
from rl.image_head import add_image_head

PROMPT, PICTURES = 12, 2


@pytest.fixture(scope="module")
def anatomy():
    return read_anatomy(base_path())


@pytest.fixture
def base() -> Policy:
    return Policy.from_pretrained(base_path())


def counted(run) -> int:
    """Count with the attention that is made of matrix products: the counter knows those."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def inputs(policy: Policy):
    ids = torch.zeros(PICTURES, PROMPT + policy.config.num_tokens, dtype=torch.int64)
    ids[:, PROMPT:] = policy.config.image_start_id
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    return ids, mask


def test_sampling(base, anatomy):
    config = base.config
    sampler = ImageTokenSampler(
        base.ar, config.image_start_id, config.num_image_tokens, config.num_tokens, config.pad_id
    )
    measured = counted(lambda: sampler.sample([[5] * PROMPT], 4, Sampling(), [0, 1, 2, 3]))
    expected = flops.sampling_flops(
        anatomy.parts["ar"], PROMPT, config.num_tokens, config.num_image_tokens, group=4
    )
    assert measured / 4 == pytest.approx(expected, rel=1e-4)


def test_the_diffusion_head_the_connector_and_the_autoencoder(base, anatomy):
    hidden = torch.zeros(PICTURES, 37, base.ar.config.hidden_size)
    conditions = base.connector(hidden)
    noise = base.noise([0, 1])
    time = torch.zeros(PICTURES)
    with torch.no_grad():
        assert counted(lambda: base.connector(hidden)) == PICTURES * flops.connector_flops(anatomy)
        assert counted(
            lambda: base.diffusion(noise, conditions, timestep=time)
        ) == PICTURES * flops.head_flops(anatomy)
        assert counted(lambda: base.vae.decode(noise)) == PICTURES * flops.decoder_flops(
            anatomy.parts["vae"], anatomy.latent_size
        )


def head_product(policy: Policy) -> int:
    """Operations of the image rows of the head, for all pictures."""
    config = policy.config
    width = policy.ar.config.hidden_size
    return PICTURES * 2 * config.num_tokens * config.num_image_tokens * width


def test_a_full_update(base, anatomy):
    ids, mask = inputs(base)
    tokens, codes = base.config.num_tokens, base.config.num_image_tokens
    add_image_head(base.ar, base.config.image_start_id, codes, 1.0)

    def update():
        output = base.ar(input_ids=ids, attention_mask=mask, image_tokens=tokens)
        output.log_probs.sum().backward()

    expected = flops.update_flops(anatomy.parts["ar"], PROMPT + tokens, tokens, codes, None)
    # The counter does not know `addmm_`, by which the head's two gradients are added up.
    assert counted(update) + 2 * head_product(base) == PICTURES * expected


def test_an_update_of_adapters(base, anatomy):
    from peft import LoraConfig, get_peft_model

    lora = LoraSection(rank=4)
    ids, mask = inputs(base)
    tokens, codes = base.config.num_tokens, base.config.num_image_tokens
    add_image_head(base.ar, base.config.image_start_id, codes, 1.0)
    model = get_peft_model(base.ar, LoraConfig(r=4, target_modules=list(lora.targets)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops.adapter_parameters(anatomy.parts["ar"], lora) == trained

    def update():
        output = model(input_ids=ids, attention_mask=mask, image_tokens=tokens)
        output.log_probs.sum().backward()

    expected = flops.update_flops(anatomy.parts["ar"], PROMPT + tokens, tokens, codes, lora)
    # The counter does not know `addmm_`, by which the head's one gradient is added up.
    found = counted(update) + head_product(base)
    # The first layer's frozen projections need no gradient of their input: one in six of q, k, v.
    assert found < PICTURES * expected
    assert found == pytest.approx(PICTURES * expected, rel=0.04)


@pytest.fixture(scope="module")
def published():
    return published_anatomy()


def test_the_published_classes_on_the_meta_device(published):
    modules = published_modules()
    length = 60 + 729
    with torch.device("meta"), torch.no_grad():
        mask = {"full_attention": torch.zeros(1, 1, length, length)}
        ids = torch.zeros(1, length, dtype=torch.int64)
        hidden, latents = torch.zeros(1, 730, 2048), torch.zeros(1, 32, 32, 32)
        ar = counted(lambda: modules["ar"].model(ids, attention_mask=mask, use_cache=False))
        head = counted(
            lambda: modules["diffusion"](
                latents, modules["connector"](hidden), timestep=torch.zeros(1)
            )
        )
        decoder = counted(lambda: modules["vae"].decode(latents))
    assert ar == flops.forward_flops(published.parts["ar"], length, 0, 0)
    assert head == flops.head_flops(published) + flops.connector_flops(published)
    assert decoder == flops.decoder_flops(published.parts["vae"], 32)


def test_a_step_of_the_published_recipe(published):
    """Against the field's rules of thumb: 2 N a token, 173 T for 30 guided steps at 1024 px."""
    changes = ["decode.train.steps=30", "rollout.engine=transformers", "policy.lora=null"]
    recipe = load_recipe("blip3o-next-3b/grpo-geneval", changes).recipe
    step = flops.grpo_flops(recipe, published)
    body = 28 * (2048 * (2048 + 2 * 1024) + 2048 * 2048 + 3 * 2048 * 6144)
    assert body == pytest.approx(1.41e9, rel=0.005)
    # With keys and values computed once; in every call, as published, it is 190 T.
    assert step.diffusion == pytest.approx(173e12, rel=0.03)
    assert 60 * flops.head_flops(published) == pytest.approx(190e12, rel=0.03)
    head = 65_536 * 2048 * 729
    assert step.sampling == pytest.approx(2 * (body * 729 + head), rel=0.1)
    # Six for training, two for the reference pass of the KL term.
    whole = body * (published.prompt_tokens + 729) + head
    assert step.update == pytest.approx((6 + 2) * whole, rel=0.1)
    unguided = load_recipe("blip3o-next-3b/grpo-geneval", [*changes, "decode.train.guidance=1"])
    fewer = flops.grpo_flops(unguided.recipe, published)
    assert math.isclose(step.diffusion / fewer.diffusion, 2, rel_tol=1e-2)
    assert fewer.autoencoder == step.autoencoder
