"""The converted policy computes what the published code computed, within the issue's tolerances."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from policy.convert import to_upstream

# mode of the published config -> our routes
MODES = {
    "cross_attention": ("cross_attention",),
    "noise_space": ("noise_space",),
    "both": ("cross_attention", "noise_space"),
}


def assert_close(found: torch.Tensor, expected: torch.Tensor, within: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= within


def conditioning(policy, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The rows that the head is conditioned on, as training picks them."""
    return hidden.take_along_dim(policy.image_places(ids)[..., None], dim=1)


def decoding(reference) -> dict[str, float]:
    facts = reference.facts
    return {"steps": facts["num_inference_steps"], "guidance": facts["guidance_scale"]}


@pytest.mark.parametrize("name", ["text_to_image", "editing"])
def test_the_checkpoint_comes_back_tensor_by_tensor(name, request, tmp_path):
    reference = request.getfixturevalue(name)
    to_upstream(reference.folder, tmp_path / "back")
    expected = load_file(reference.checkpoint / "model.safetensors")
    found = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


# --- text to image -------------------------------------------------------------------------------


def test_image_codes_are_equal(text_to_image):
    codes = text_to_image.policy.encode_images(text_to_image.tensors["images"])
    assert torch.equal(codes, text_to_image.tensors["image_tokens"])


@pytest.mark.parametrize("number", [0, 1])
def test_prompts_hidden_states_logprobs_and_picture(number, text_to_image):
    policy, tensors, facts = text_to_image.policy, text_to_image.tensors, text_to_image.facts
    ids, prompt = tensors[f"{number}.input_ids"], facts["prompts"][number]
    assert policy.prompt_text(prompt) == facts["texts"][number]
    assert policy.prompt_ids([prompt]) == [ids[0, : -policy.config.num_tokens].tolist()]
    hidden, logprobs = policy.score(ids, torch.ones_like(ids))
    assert_close(hidden, tensors[f"{number}.last_hidden_state"], 1e-4)
    assert_close(logprobs, tensors[f"{number}.token_logprobs"], 1e-4)
    rows = conditioning(policy, hidden, ids)
    pixels = policy.render(rows, noise=tensors[f"{number}.noise"], **decoding(text_to_image))
    assert_close(pixels, tensors[f"{number}.image"], 2e-3)


def test_a_batch_of_prompts_gives_what_each_gives_alone(text_to_image):
    """The published re-forward has no mask: padding of the shorter prompt reaches its picture."""
    policy, tensors = text_to_image.policy, text_to_image.tensors
    count = policy.config.num_tokens
    given = [tensors[f"{number}.input_ids"][0] for number in (0, 1)]
    assert len(given[0]) != len(given[1])
    prompts = [ids[:-count].tolist() for ids in given]
    rows = policy.condition_rows(prompts, torch.stack([ids[-count:] for ids in given]))
    noise = torch.cat([tensors[f"{number}.noise"] for number in (0, 1)])
    pixels = policy.render(rows, noise=noise, **decoding(text_to_image))
    for number in (0, 1):
        expected = tensors[f"{number}.last_hidden_state"][:, -count - 1 :]
        assert_close(rows[number : number + 1], expected, 1e-4)
        assert_close(pixels[number : number + 1], tensors[f"{number}.image"], 2e-3)


# --- editing -------------------------------------------------------------------------------------


def test_reference_codes_and_latents(editing):
    tensors = editing.tensors
    codes = editing.policy.encode_images(tensors["reference_images"])
    assert torch.equal(codes, tensors["reference_tokens"])
    assert_close(
        editing.policy.encode_latents(tensors["reference_images"]),
        tensors["reference_latents"],
        1e-4,
    )


def test_an_instruction_and_its_reference_become_the_published_ids(editing):
    """The reference run left the system turn out, and its tokenizer has no vision tags."""
    policy, tensors = editing.policy, editing.tensors
    template = policy.config.edit_template
    user = template.index("<|im_start|>user")
    config = replace(policy.config, edit_template=template[user:])
    codes = tensors["reference_tokens"][:, None]
    found = policy._prompt_encoder.ids(config, editing.facts["instructions"], codes)
    expected = [tensors[f"{number}.input_ids"][0].tolist() for number in (0, 1)]
    assert found == [ids[: -config.num_tokens] for ids in expected]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [0, 1])
def test_an_edited_picture(number, mode, editing):
    policy, tensors = editing.policy, editing.tensors
    ids = tensors[f"{number}.input_ids"]
    hidden, _ = policy.score(ids, torch.ones_like(ids))
    assert_close(hidden, tensors[f"{number}.last_hidden_state"], 1e-4)
    pixels = policy.render(
        conditioning(policy, hidden, ids),
        noise=tensors[f"{number}.noise"],
        references=tensors["reference_images"][number : number + 1],
        routes=MODES[mode],
        **decoding(editing),
    )
    assert_close(pixels, tensors[f"{number}.image.{mode}"], 2e-4)


def test_the_default_route_is_that_of_the_published_config(editing):
    assert editing.policy.config.routes == MODES["both"]
