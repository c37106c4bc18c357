"""The policy folder, scoring, rendering and generating, on random weights."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel

from common.errors import PolicyError
from evals.policy_hash import policy_hash
from policy import Policy
from policy.denoiser import Denoiser
from policy.policy import to_images

PARTS = ("ar", "tokenizer", "image_tokenizer", "connector", "diffusion", "vae", "scheduler")
PROMPTS = ["a photo of a red circle", "x", 'a photo of a sign that says "CAB"']


def tensors(policy: Policy) -> dict[str, torch.Tensor]:
    return dict(policy.state_dict())


def images_of(policy: Policy, **options) -> list[np.ndarray]:
    return [np.asarray(picture, dtype=int) for picture in policy.generate(PROMPTS, **options)]


def hidden_rows(policy: Policy, batch: int, seed: int = 0) -> torch.Tensor:
    shape = (batch, 1 + policy.config.num_tokens, policy.ar.config.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the folder ----------------------------------------------------------------------------------


def test_a_saved_policy_is_read_back_tensor_by_tensor(policy, tmp_path):
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter += 0.01 * (number + 1)
    policy.save_pretrained(tmp_path / "copy")
    copy = Policy.from_pretrained(tmp_path / "copy")
    expected, found = tensors(policy), tensors(copy)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert copy.config == policy.config
    assert copy.scheduler_config == policy.scheduler_config
    assert copy.vae.config.scaling_factor == policy.vae.config.scaling_factor
    assert copy.prompt_ids(PROMPTS) == policy.prompt_ids(PROMPTS)
    assert not copy.training


def test_a_policy_stored_in_bfloat16_keeps_its_precision_in_memory(policy, tmp_path):
    before = {name: tensor.clone() for name, tensor in tensors(policy).items()}
    policy.save_pretrained(tmp_path / "small", torch.bfloat16)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(policy).items())
    small = Policy.from_pretrained(tmp_path / "small")
    for name, tensor in tensors(small).items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name].to(torch.bfloat16).to(before[name].dtype)), name


def test_rotary_frequencies_keep_float32_in_a_policy_of_bfloat16(policy, policy_folder):
    read = Policy.from_pretrained(policy_folder, torch.bfloat16)
    assert {parameter.dtype for parameter in read.parameters()} == {torch.bfloat16}
    found, expected = (p.ar.model.rotary_emb.inv_freq for p in (read, policy))
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_ar_part_is_a_plain_causal_lm_checkpoint(policy, policy_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy_folder / "ar")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    ids = torch.tensor(policy.prompt_ids(PROMPTS[:1]))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, policy.ar(ids).logits)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(part, policy_folder, tmp_path):
    folder = shutil.copytree(policy_folder, tmp_path / "policy")
    shutil.rmtree(folder / part)
    with pytest.raises(PolicyError, match=rf"policy/{part} is missing"):
        Policy.from_pretrained(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_its_files_is_named(part, policy_folder, tmp_path):
    folder = shutil.copytree(policy_folder, tmp_path / "policy")
    for file in (folder / part).iterdir():
        file.unlink()
    with pytest.raises(PolicyError, match=rf"policy/{part} cannot be loaded"):
        Policy.from_pretrained(folder)


@pytest.mark.parametrize("part", ["ar", "image_tokenizer", "connector", "diffusion", "vae"])
def test_truncated_weights_are_named(part, policy_folder, tmp_path):
    folder = shutil.copytree(policy_folder, tmp_path / "policy")
    [weights] = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(PolicyError, match=rf"policy/{part} cannot be loaded"):
        Policy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "policy.json is missing"), ("{", "cannot be read"), ('{"grid": 6}', "cannot be read")],
)
def test_a_folder_without_its_description_is_refused(text, words, policy_folder, tmp_path):
    folder = shutil.copytree(policy_folder, tmp_path / "policy")
    (folder / "policy.json").unlink()
    if text is not None:
        (folder / "policy.json").write_text(text)
    with pytest.raises(PolicyError, match=words):
        Policy.from_pretrained(folder)


def test_ids_in_the_description_are_those_of_the_tokenizer(policy, policy_folder):
    facts = json.loads((policy_folder / "policy.json").read_text())
    for key, token in [
        ("im_start_id", "<im_start>"),
        ("im_end_id", "<im_end>"),
        ("scale_start_id", "<S0>"),
        ("image_start_id", "<I0>"),
        ("eos_id", "<|im_end|>"),
        ("pad_id", "<|endoftext|>"),
    ]:
        assert facts[key] == policy.tokenizer.convert_tokens_to_ids(token)
    last = policy.tokenizer.convert_tokens_to_ids(f"<I{facts['num_image_tokens'] - 1}>")
    assert last == facts["image_start_id"] + facts["num_image_tokens"] - 1
    assert facts["scale_start_id"] + facts["num_scale_tokens"] == facts["image_start_id"]


# --- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_of_a_padded_batch_are_those_of_its_rows_alone(policy, side):
    rows = policy.prompt_ids(PROMPTS)
    width = max(map(len, rows))
    # Any real token as padding: the mask alone must keep it out.
    padding = [policy.config.image_start_id + 5]
    ids, mask = [], []
    for row in rows:
        fill = [width - len(row)] * 2
        pad, zeros, ones = padding * fill[0], [0] * fill[1], [1] * len(row)
        ids.append(pad + row if side == "left" else row + pad)
        mask.append(zeros + ones if side == "left" else ones + zeros)
    with torch.no_grad():
        hidden, logprobs = policy.score(torch.tensor(ids), torch.tensor(mask))
    assert hidden.shape == (3, width, policy.ar.config.hidden_size)
    assert logprobs.shape == (3, width - 1)
    for number, row in enumerate(rows):
        real = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        with torch.no_grad():
            plain = policy.ar.model(torch.tensor([row])).last_hidden_state[0]
            logits = policy.ar(torch.tensor([row])).logits[0, :-1].double().numpy()
        torch.testing.assert_close(hidden[number, real], plain, atol=1e-5, rtol=1e-5)
        expected = [
            line[token] - math.log(np.exp(line - line.max()).sum()) - line.max()
            for line, token in zip(logits, row[1:], strict=True)
        ]
        found = logprobs[number, real.start : real.stop - 1]
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_condition_rows_are_the_hidden_states_at_s0_and_the_image_tokens(policy):
    prompts = policy.prompt_ids(PROMPTS)
    first, count = policy.config.image_start_id, policy.config.num_tokens
    generator = torch.Generator().manual_seed(3)
    tokens = first + torch.randint(policy.config.num_image_tokens, (3, count), generator=generator)
    found = policy.condition_rows(prompts, tokens)
    for number, prompt in enumerate(prompts):
        assert prompt[-1] == policy.config.scale_start_id
        ids = torch.tensor([prompt + tokens[number].tolist()])
        with torch.no_grad():
            plain = policy.ar.model(ids).last_hidden_state[0, len(prompt) - 1 :]
        torch.testing.assert_close(found[number], plain, atol=1e-5, rtol=1e-5)


def test_condition_rows_see_no_dropout_and_leave_the_mode_as_it_was(policy):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(policy.ar, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    prompts = policy.prompt_ids(PROMPTS)
    tokens = torch.full((3, policy.config.num_tokens), policy.config.image_start_id)
    first, second = (policy.condition_rows(prompts, tokens) for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())


# --- pictures to codes and latents ---------------------------------------------------------------


def test_pictures_become_codes_and_scaled_latents(policy):
    config = policy.config
    pixels = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = policy.encode_images(pixels)
    assert codes.shape == (3, config.num_tokens)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < config.num_image_tokens
    assert codes.unique().numel() > 1
    assert torch.equal(policy.encode_images(pixels[1:2]), codes[1:2])
    assert policy.encode_images(torch.zeros(2, 3, 96, 96)).shape == (2, config.num_tokens)
    latents = policy.encode_latents(pixels)
    assert latents.shape == (3, config.latent_channels, config.latent_size, config.latent_size)
    with torch.no_grad():
        torch.testing.assert_close(latents / 0.7, policy.vae.encode(pixels).latent)


def test_codes_are_the_nearest_code_vectors_by_angle(policy):
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    tokenizer = policy.image_tokenizer
    with torch.no_grad():
        features = tokenizer.features(pixels).double().numpy()
        linear = tokenizer.quantizer.embedding_proj
        vectors = linear(tokenizer.quantizer.embedding.weight).double().numpy()
    angles = np.einsum("bnd,kd->bnk", features, vectors)
    angles /= np.linalg.norm(features, axis=-1)[..., None] * np.linalg.norm(vectors, axis=-1)
    assert np.array_equal(policy.encode_images(pixels).numpy(), angles.argmax(-1))


# --- rendering -----------------------------------------------------------------------------------


def euler(
    policy: Policy, hidden, noise, steps: int, guidance: float, interval=(0.0, 1.0)
) -> torch.Tensor:
    """The flow from noise (time 1) to latents (time 0) in equal steps, written out."""
    rows = torch.zeros_like(hidden)
    latents = noise
    times = np.linspace(1, 0, steps + 1)
    for now, after in pairwise(times):
        timestep = torch.full((len(hidden),), 1000 * float(now))
        velocity, null = (
            policy.diffusion(latents, policy.connector(h), timestep=timestep).sample
            for h in (hidden, rows)
        )
        if interval[0] <= round(float(now), 9) <= interval[1]:
            velocity = null + guidance * (velocity - null)
        latents = latents + float(after - now) * velocity
    return (policy.vae.decode(latents / 0.7).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 1.0), (3, 2.5), (4, 0.0)])
def test_rendering_is_the_euler_integration_with_guidance(policy, steps, guidance):
    hidden, noise = hidden_rows(policy, 2), policy.noise([5, 6])
    found = policy.render(hidden, noise=noise, steps=steps, guidance=guidance)
    with torch.no_grad():
        expected = euler(policy, hidden, noise, steps, guidance)
    assert found.shape == (2, 3, 48, 48)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


INTERVALS = [
    # Of five steps at noise levels 1, 0.8, 0.6, 0.4 and 0.2; both ends are inside.
    ((0.0, 1.0), [4, 4, 4, 4, 4]),
    ((0.4, 0.8), [2, 4, 4, 4, 2]),
    ((0.5, 0.7), [2, 2, 4, 2, 2]),
    ((0.0, 0.1), [2, 2, 2, 2, 2]),
]


@pytest.fixture
def pictures_at_once(policy):
    """How many pictures each call of the diffusion head was about, both branches counted."""
    seen = []
    policy.diffusion.proj_out.register_forward_hook(
        lambda module, given, out: seen.append(len(out))
    )
    return seen


def test_guidance_one_leaves_the_null_branch_out(policy, pictures_at_once):
    policy.render(hidden_rows(policy, 2), steps=3, guidance=1.0)
    assert pictures_at_once == [2, 2, 2]


@pytest.mark.parametrize(("interval", "calls"), INTERVALS)
def test_guidance_in_an_interval_of_noise_levels(policy, pictures_at_once, interval, calls):
    """Outside of it there is the conditioned branch alone, and nothing else is computed."""
    hidden, noise = hidden_rows(policy, 2), policy.noise([5, 6])
    options = {"noise": noise, "steps": 5, "guidance": 2.5}
    found = policy.render(hidden, guidance_interval=interval, **options)
    assert pictures_at_once == calls
    with torch.no_grad():
        expected = euler(policy, hidden, noise, 5, 2.5, interval)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    if interval != (0.0, 1.0):
        assert float((found - policy.render(hidden, **options)).abs().max()) > 1e-2


def test_the_interval_is_of_the_noise_levels_that_the_scheduler_has(policy, pictures_at_once):
    """A shift of 3 makes of the levels 1, 0.75, 0.5, 0.25: 1, 0.9, 0.75, 0.5."""
    policy.scheduler_config["shift"] = 3.0
    options = {"steps": 4, "guidance": 2.0, "guidance_interval": (0.7, 0.9)}
    policy.render(hidden_rows(policy, 2), seed=0, **options)
    assert pictures_at_once == [2, 4, 4, 2]


@pytest.mark.parametrize("null_rows", [[0, 1, 2, 3, 4], [0] * 5, [0, 0, 0, 1, 1]])
@pytest.mark.parametrize("variant", ["shipped", "qk_norm", "two pixels a patch"])
def test_the_denoiser_is_the_head_with_fixed_conditions(variant, null_rows):
    """Against the library's own forward pass, for both branches, of heads of other kinds too."""
    torch.manual_seed(0)
    head = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        mlp_ratio=2.0,
        sample_size=8,
        patch_size=2 if variant == "two pixels a patch" else 1,
        norm_elementwise_affine=variant == "qk_norm",
        qk_norm="rms_norm_across_heads" if variant == "qk_norm" else None,
        interpolation_scale=1 if variant == "shipped" else None,
    ).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.4)
    latents = torch.randn(3, 4, 8, 8 if variant == "shipped" else 16)  # not square
    conditions, null = torch.randn(3, 5, 12), torch.randn(1, 5, 12)[:, null_rows]
    denoiser = Denoiser(head, conditions, null)
    for moment in (1000.0, 250.0):
        timestep = torch.tensor(moment)
        found = denoiser.velocity(latents, timestep)
        for velocity, given in zip(found, (conditions, null.expand_as(conditions)), strict=True):
            with torch.no_grad():
                expected = head(latents, given, timestep=timestep.expand(3)).sample
            assert expected.std() > 0.1
            torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)


def test_a_picture_is_a_function_of_its_row_and_its_noise(policy):
    hidden, noise = hidden_rows(policy, 3), policy.noise([1, 2, 3])
    options = {"steps": 2, "guidance": 1.5}
    first = policy.render(hidden, noise=noise, **options)
    assert torch.equal(first, policy.render(hidden, noise=noise, **options))
    alone = policy.render(hidden[1:2], noise=noise[1:2], **options)
    torch.testing.assert_close(alone, first[1:2], atol=1e-5, rtol=0)
    other = policy.render(hidden, noise=policy.noise([1, 2, 4]), **options)
    torch.testing.assert_close(other[:2], first[:2], atol=1e-5, rtol=0)
    assert (other[2] - first[2]).abs().max() > 1e-3
    assert (policy.render(hidden, seed=1, **options) - first).abs().max() > 1e-3


def test_noise_rows_are_standard_normal_and_depend_on_their_own_seed(policy):
    noise = policy.noise(list(range(50)))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert torch.equal(policy.noise([7])[0], noise[7])
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 50


def test_the_defaults_of_the_folder_are_used(policy):
    from dataclasses import replace

    hidden = hidden_rows(policy, 1)
    policy.config = replace(policy.config, steps=3, guidance=2.0)
    assert torch.equal(policy.render(hidden), policy.render(hidden, steps=3, guidance=2.0))
    assert not torch.equal(policy.render(hidden), policy.render(hidden, steps=2, guidance=2.0))


# --- generating ----------------------------------------------------------------------------------


def test_a_generated_picture_depends_on_its_prompt_and_seed_alone(policy):
    options = {"steps": 2, "guidance": 1.5}
    together = images_of(policy, seeds=[11, 12, 13], **options)
    for number, prompt in enumerate(PROMPTS):
        [alone] = policy.generate([prompt], seeds=[11 + number], **options)
        # One level: the width of the padding moves a value that lies between two by a rounding.
        assert np.abs(np.asarray(alone, dtype=int) - together[number]).max() <= 1
    others = images_of(policy, seeds=[21, 22, 23], **options)
    assert all(np.abs(one - other).max() > 1 for one, other in zip(together, others, strict=True))


def test_one_seed_gives_every_place_its_own_picture_again(policy):
    state = torch.get_rng_state()
    first = images_of(policy, seed=4, steps=2)
    again = images_of(policy, seed=4, steps=2)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    same = policy.generate([PROMPTS[0]] * 2, seed=4, steps=2)
    assert np.abs(np.asarray(same[0], dtype=int) - np.asarray(same[1], dtype=int)).max() > 1
    assert torch.equal(state, torch.get_rng_state())


def test_temperature_reaches_the_sampler(policy):
    # With the same noise for all, nothing but the tokens is left to differ.
    noise = policy.noise([0])
    policy.noise = lambda seeds: noise.expand(len(seeds), -1, -1, -1)
    cold = [images_of(policy, seed=seed, temperature=1e-4, steps=1)[0] for seed in (1, 2)]
    warm = [images_of(policy, seed=seed, temperature=1.0, steps=1)[0] for seed in (1, 2)]
    assert np.abs(cold[0] - cold[1]).max() <= 1
    assert np.abs(warm[0] - warm[1]).max() > 1


def test_reference_pictures_are_refused(policy):
    with pytest.raises(PolicyError, match="reference"):
        policy.generate(PROMPTS, references=torch.zeros(3, 3, 48, 48))
    with pytest.raises(PolicyError, match="reference"):
        policy.prompt_text("x", references=1)


def test_pixels_are_rounded_not_cut():
    [picture] = to_images(
        torch.tensor([0.0, 0.5019, 0.9999, 1.5]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    )
    assert np.asarray(picture)[..., 0].tolist() == [[0, 128], [255, 255]]


def test_the_path_of_the_shipped_base_is_inside_the_package():
    import policy as package

    assert package.base_path() == Path(package.__file__).parent / "base"


def test_the_hash_sees_settings_as_well_as_weights(policy):
    before = policy_hash(policy)
    assert policy_hash(policy) == before
    for change in (
        lambda: policy.scheduler_config.__setitem__("shift", 7.0),
        lambda: setattr(policy, "config", replace(policy.config, prompt_template="draw {prompt}")),
        lambda: policy.vae.register_to_config(scaling_factor=0.1),
    ):
        change()
        after = policy_hash(policy)
        assert after != before
        before = after
    policy.config = replace(policy.config, provenance={"from": "elsewhere"})
    assert policy_hash(policy) == before


def test_codecs_compute_in_their_own_type_when_the_language_model_is_cast(policy):
    """As DeepSpeed does in bf16: it casts what it trains, and leaves the codecs as they are."""
    pixels = torch.rand(2, 3, 48, 48) * 2 - 1
    codes, latents = policy.encode_images(pixels), policy.encode_latents(pixels)
    policy.ar.to(torch.bfloat16)
    assert torch.equal(policy.encode_images(pixels), codes)
    assert torch.equal(policy.encode_latents(pixels), latents)


def test_latents_that_the_head_s_patches_do_not_cover_are_refused(policy):
    """diffusers would cut the last row off, and a picture of another size would come out."""
    policy.diffusion.register_to_config(patch_size=4)  # of six cells
    parts = (policy.tokenizer, policy.ar, policy.image_tokenizer, policy.connector)
    with pytest.raises(PolicyError, match=r"latent_size is 6, and .* patch_size of 4"):
        Policy(policy.config, *parts, policy.diffusion, policy.vae, policy.scheduler_config)
