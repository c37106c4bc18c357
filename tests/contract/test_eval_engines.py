"""Evaluation through a rollout engine: the pictures of the policy's own sampler, and real vLLM."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evals.engines import EnginePolicy, sampled_by
from policy import Policy
from rollout.build import EngineSpec
from rollout.transformers_engine import TransformersEngine

PROMPTS = ["a photo of a red circle", "a photo of two squares and a ring", "a sign"]
SEEDS = [11, 22, 2**62 + 5]


def pictures(painter: Policy | EnginePolicy, temperature: float) -> np.ndarray:
    images = painter.generate(PROMPTS, steps=2, guidance=1.5, temperature=temperature, seeds=SEEDS)
    return np.stack([np.asarray(image, dtype=float) for image in images])


def test_an_engine_with_the_policy_s_own_sampler_paints_its_pictures(policy: Policy) -> None:
    config = policy.config
    engine = TransformersEngine(
        policy.ar, config.image_start_id, config.num_image_tokens, config.num_tokens, config.pad_id
    )
    own = pictures(policy, 1.0)
    np.testing.assert_array_equal(pictures(EnginePolicy(policy, engine), 1.0), own)
    assert np.abs(own[0] - own[1]).max() > 0


def test_vllm_paints_the_same_pictures_where_chance_has_no_say(
    policy: Policy, tmp_path: Path
) -> None:
    """With a sharp head and a low temperature both samplers take the most probable token."""
    with torch.no_grad():
        policy.ar.lm_head.weight *= 20
    policy.save_pretrained(tmp_path / "sharp")
    own = pictures(policy, 0.01)
    with sampled_by("vllm", policy, tmp_path / "sharp", PROMPTS) as painter:
        np.testing.assert_allclose(pictures(painter, 0.01), own, atol=2)
        warm = pictures(painter, 2.0)
        np.testing.assert_array_equal(pictures(painter, 2.0), warm)
    assert np.abs(warm - own).max() > 2


def test_the_transformers_engine_is_the_policy_itself(policy: Policy, policy_folder: Path) -> None:
    with sampled_by("transformers", policy, policy_folder, PROMPTS) as painter:
        assert painter is policy


def test_the_engine_is_started_for_the_longest_prompt(
    policy: Policy, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(spec: EngineSpec, events: list) -> SimpleNamespace:
        built.append(spec)
        return SimpleNamespace(close=lambda: built.append("closed"))

    monkeypatch.setattr(EngineSpec, "build", build)
    long = "a photo of a red circle " * 40
    with sampled_by("vllm", policy, policy_folder, ["a photo", long]):
        pass
    assert built[0].max_prompt_length == len(policy.prompt_ids([long])[0]) > 256
    assert built[0].dtype == "float32"
    assert built[1] == "closed"
