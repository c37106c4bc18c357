"""Does the picture follow the tokens? Measures of the renderer that no reward can stand for.

Reinforcement learning of the tokens works only as far as the diffusion head draws what the tokens
say, whatever the noise and whatever the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.seeds import counter_seed
from data.prompts import GENEVAL_TASKS
from data.scenes import Scene, caption, paint, sample_scene
from policy.policy import Policy, to_images
from rewards.geneval import geneval
from rewards.scene_detector import SceneDetector

_SURE = 0.9
_PIXELS = 4.0


@dataclass(frozen=True)
class Fidelity:
    """Shares in [0, 1] of held-out scenes whose picture shows them exactly, with an n."""

    own_prompt: float
    """Rendered from the scene's tokens after its own caption."""
    swapped_prompt: float
    """Rendered from the same tokens after another scene's caption."""
    autoencoder: float
    """The scene's picture through encoder and decoder alone: the ceiling."""
    scenes: int


def shows(scene: Scene, image: Image.Image, detector: SceneDetector) -> bool:
    """True if exactly the scene's objects are detected: class, colour and place (4 px)."""
    found = [d for d in detector.detect([image])[0] if d.score > _SURE]
    if len(found) != len(scene.objects):
        return False
    colors = detector.classify_colors(image, found)
    left = [
        (d.label, color, (d.box_xyxy[0] + d.box_xyxy[2]) / 2, (d.box_xyxy[1] + d.box_xyxy[3]) / 2)
        for d, color in zip(found, colors, strict=True)
    ]
    for item in scene.objects:
        x, y = 8 * item.cell[0] + item.jitter[0], 8 * item.cell[1] + item.jitter[1]
        match = next(
            (
                entry
                for entry in left
                if entry[:2] == (item.label, item.color)
                and abs(entry[2] - x) <= _PIXELS
                and abs(entry[3] - y) <= _PIXELS
            ),
            None,
        )
        if match is None:
            return False
        left.remove(match)
    return True


def held_out_scenes(count: int) -> list[Scene]:
    """Draw held-out scenes, the six object tasks in turn."""
    rng = np.random.default_rng(counter_seed(0, "fidelity"))
    return [
        sample_scene(rng, {GENEVAL_TASKS[i % 6]: 1.0}, "train" if i % 6 == 0 else "held_out")
        for i in range(count)
    ]


@torch.no_grad()
def fidelity(policy: Policy, count: int = 600) -> Fidelity:
    """Render the tokens of `count` held-out scenes and look for exactly their objects."""
    scenes = held_out_scenes(count)
    pixels = torch.from_numpy(np.stack([paint(scene) for scene in scenes]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = torch.cat([policy.encode_images(part) for part in pixels.split(128)])
    captions = [caption(scene) for scene in scenes]
    swapped = captions[1:] + captions[:1]
    detector = SceneDetector()

    def share(images: Sequence[Image.Image]) -> float:
        return float(np.mean([shows(s, i, detector) for s, i in zip(scenes, images, strict=True)]))

    scaled = [policy.encode_latents(part) for part in pixels.split(128)]
    decoded = [
        policy.vae.decode(part / policy.vae.config.scaling_factor).sample / 2 + 0.5
        for part in scaled
    ]
    return Fidelity(
        share(render_tokens(policy, captions, codes, 0)),
        share(render_tokens(policy, swapped, codes, 0)),
        share(to_images(torch.cat(decoded).float())),
        count,
    )


@torch.no_grad()
def render_tokens(
    policy: Policy,
    prompts: Sequence[str],
    codes: Tensor,
    noise_seed: int,
    same_noise: int = 1,
) -> list[Image.Image]:
    """Render codes [B, N] after given prompts; `same_noise` neighbours share their noise."""
    images: list[Image.Image] = []
    ids = policy.prompt_ids(prompts)
    for start in range(0, len(ids), 128):
        rows = range(start, min(start + 128, len(ids)))
        tokens = codes[start : start + 128] + policy.config.image_start_id
        hidden = policy.condition_rows(ids[start : start + 128], tokens)
        noise = policy.noise(
            [counter_seed(noise_seed, "fidelity-noise", i // same_noise) for i in rows]
        )
        images += to_images(policy.render(hidden, noise=noise))
    return images


@torch.no_grad()
def two_noise_correlation(
    policy: Policy,
    records: Sequence[dict[str, object]],
    codes: Tensor,
    group_size: int,
) -> tuple[float, int]:
    """Return the median within-group correlation of rewards of the same tokens under two noises.

    `codes` [P * group_size, N] are samples for the P records. Groups in which either noise gives
    all members the same reward have no correlation and are left out; the second value is the
    number of groups that count.
    """
    prompts = [str(record["prompt"]) for record in records for _ in range(group_size)]
    metadata = [record["metadata"] for record in records for _ in range(group_size)]
    rewards = []
    for seed in (1, 2):
        images = render_tokens(policy, prompts, codes, seed, group_size)
        scores = geneval(images, metadata)  # type: ignore[arg-type]
        rewards.append(np.array([score.value for score in scores]).reshape(-1, group_size))
    correlations = [
        float(np.corrcoef(first, second)[0, 1])
        for first, second in zip(*rewards, strict=True)
        if first.std() > 0 and second.std() > 0
    ]
    return float(np.median(correlations)), len(correlations)
