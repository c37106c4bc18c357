"""What people prefer and what fits the prompt, as published networks see it.

Each takes its published weights as a path or from the Hugging Face hub (`revision` pins them; see
`rewards.networks.weights`) and loads them on first use.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from rewards.plugins import reward

if TYPE_CHECKING:
    from rewards.networks.open_clip_model import OpenClip


@reward(name="clip_score")
def clip_score(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    weights: str,
    model: str = "ViT-L-14-quickgelu",
    revision: str | None = None,
    device: str = "cpu",
) -> list[float]:
    """Return the cosine of picture and prompt in CLIP's space, in [-1, 1]; typically 0.15 to 0.35.

    `model` is open_clip's name of the architecture. The published CLIPScore (Hessel et al. 2021) is
    2.5 times this, cut at 0.
    """
    from rewards.networks.open_clip_model import open_clip_model

    return _cosines(open_clip_model(model, weights, revision, device), images, prompts)


@reward(name="hps_v2")
def hps_v2(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    weights: str,
    model: str = "ViT-H-14",
    revision: str | None = None,
    device: str = "cpu",
) -> list[float]:
    """Return HPS v2.1 (Wu et al. 2023), a cosine in [-1, 1]; typically 0.2 to 0.35.

    `weights`: HPS_v2.1_compressed.pt (hub: xswu/HPSv2/HPS_v2.1_compressed.pt), a fine-tuned CLIP
    ViT-H-14. The published tables show it times 100. As in the published code, pictures that are
    not square are padded with black; CLIPScore cuts them to their middle.
    """
    from rewards.networks.open_clip_model import open_clip_model

    clip = open_clip_model(model, weights, revision, device, whole_picture=True)
    return _cosines(clip, images, prompts)


@reward(name="pick_score")
def pick_score(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    weights: str,
    processor: str | None = None,
    revision: str | None = None,
    processor_revision: str | None = None,
    device: str = "cpu",
) -> list[float]:
    """Return PickScore (Kirstain et al. 2023) over 26, as flow_grpo does; typically 0.7 to 0.9.

    `weights`: folder or hub name (yuvalkirstain/PickScore_v1) of a transformers CLIPModel.
    `processor`: where its preparation lies if not beside the weights (published:
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K).
    """
    from rewards.networks.pick_score import pick_score_model

    network = pick_score_model(
        weights=weights,
        processor=processor or weights,
        revision=revision,
        processor_revision=processor_revision if processor else revision,
        device=device,
    )
    return network.score(images, prompts)


@reward(name="image_reward")
def image_reward(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    weights: str,
    tokenizer: str = "google-bert/bert-base-uncased",
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    device: str = "cpu",
) -> list[float]:
    """Return ImageReward (Xu et al. 2023), raw: about 0 on average with a deviation of about 1.

    `weights`: ImageReward.pt (hub: zai-org/ImageReward/ImageReward.pt).
    """
    from rewards.networks.image_reward import image_reward_model

    network = image_reward_model(
        weights=weights,
        tokenizer=tokenizer,
        revision=revision,
        tokenizer_revision=tokenizer_revision,
        device=device,
    )
    return network.score(images, prompts)


@reward(name="aesthetic")
def aesthetic(
    images: Sequence[Image.Image],
    *,
    weights: str,
    head: str,
    model: str = "ViT-L-14-quickgelu",
    revision: str | None = None,
    head_revision: str | None = None,
    device: str = "cpu",
) -> list[float]:
    """Return LAION's aesthetic prediction, raw: about 1 to 10. The prompt plays no part.

    `weights`: OpenAI's CLIP ViT-L-14 for open_clip; `head`: sac+logos+ava1-l14-linearMSE.pth.
    """
    from rewards.networks.aesthetic import aesthetic_head
    from rewards.networks.open_clip_model import open_clip_model

    features = open_clip_model(model, weights, revision, device).images(images)
    scores = aesthetic_head(head, head_revision, device)(features)[:, 0]
    return [float(score) for score in scores]


def _cosines(
    clip: "OpenClip", images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[float]:
    return [float(x) for x in (clip.images(images) * clip.texts(prompts)).sum(-1)]
