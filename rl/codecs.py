"""Train the two image codecs of a policy: the image tokenizer and the autoencoder.

Both see nothing but pictures, so they are trained first and stay fixed afterwards.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor
from torch.nn import functional as F

from data.scenes import paint, sample_scene
from policy.image_tokenizer import ImageTokenizer
from recipes.schema_pretrain import CODEC_LOG_EVERY
from rl.optimizers import MuonAdamW

Log = Callable[[int, dict[str, float]], None]


def scene_pixels(seed: int, tasks: Mapping[str, float], batch_size: int) -> Iterator[Tensor]:
    """Yield endless batches of training pictures, float32 [B, 3, 48, 48] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    while True:
        pictures = [paint(sample_scene(rng, tasks, "train")) for _ in range(batch_size)]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        yield pixels.float() / 127.5 - 1


def _cosine(step: int, steps: int, warmup: int = 50) -> float:
    ramp = min(1.0, (step + 1) / warmup)
    return ramp * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / steps)))


def train_image_tokenizer(
    tokenizer: ImageTokenizer,
    batches: Iterator[Tensor],
    *,
    steps: int,
    unquantized_steps: int,
    learning_rate: float,
    log: Log,
) -> None:
    """Fit encoder and codebook by reconstructing pixels from each patch's own code.

    The first `unquantized_steps` leave out the quantiser; k-means on the features then places the
    codebook, so that every code is in use from the start.
    """
    assert tokenizer.pixel_decoder is not None
    parameters = [p for p in tokenizer.parameters() if p.requires_grad]
    # After 200 steps the error is a fifth of AdamW's (LOG.md).
    optimizer = MuonAdamW(
        [(n, p) for n, p in tokenizer.named_parameters() if p.requires_grad], learning_rate
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _cosine(s, steps))
    reservoir: list[Tensor] = []
    for step in range(steps):
        pixels = next(batches)
        features = F.normalize(tokenizer.features(pixels), dim=-1)
        commitment = torch.zeros(())
        if step < unquantized_steps:
            decoded = features
            reservoir.append(features.detach().flatten(0, 1))
            reservoir = reservoir[-30:]
        else:
            if step == unquantized_steps:
                _place_codebook(tokenizer, torch.cat(reservoir))
            vectors, codes = tokenizer.quantizer(features)
            commitment = F.mse_loss(vectors, features.detach()) + 0.25 * F.mse_loss(
                features, vectors.detach()
            )
            decoded = features + (vectors - features).detach()
        picture = tokenizer.patches_to_pixels(tokenizer.pixel_decoder(decoded))
        reconstruction = F.mse_loss(picture, pixels)
        loss = reconstruction + 10 * commitment
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % CODEC_LOG_EVERY == 0 or step == steps - 1:
            used = float(codes.unique().numel()) if step >= unquantized_steps else 0.0
            log(step + 1, {"mse": reconstruction.item(), "codes_in_batch": used})


@torch.no_grad()
def _place_codebook(tokenizer: ImageTokenizer, features: Tensor, rounds: int = 12) -> None:
    """Set the codebook to k-means centres of unit `features` [M, dim] and the map to identity."""
    quantizer = tokenizer.quantizer
    count, dim = quantizer.embedding.weight.shape
    generator = torch.Generator().manual_seed(0)
    # Most patches are background: distinct rows only, so that rare patches get codes as well.
    features = torch.unique((features * 64).round() / 64, dim=0)
    features = F.normalize(features[torch.randperm(len(features), generator=generator)], dim=-1)
    centers = features[_spread(features[:20_000], count)]
    for _ in range(rounds):
        nearest = (features @ centers.T).argmax(-1)
        sums = torch.zeros(count, dim).index_add_(0, nearest, features)
        filled = torch.bincount(nearest, minlength=count) > 0
        centers[filled] = F.normalize(sums[filled], dim=-1)
    quantizer.embedding.weight.copy_(centers)
    quantizer.embedding_proj.weight.copy_(torch.eye(dim))
    quantizer.embedding_proj.bias.zero_()


def _spread(features: Tensor, count: int) -> Tensor:
    """Choose `count` row indices far from each other (farthest-point start for k-means)."""
    chosen = [0]
    nearest = features @ features[0]
    for _ in range(count - 1):
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, features @ features[chosen[-1]])
    return torch.tensor(chosen)


def train_autoencoder(
    autoencoder: AutoencoderDC,
    batches: Iterator[Tensor],
    *,
    steps: int,
    learning_rate: float,
    latent_noise: float,
    log: Log,
) -> None:
    """Fit the autoencoder by L1 + L2 reconstruction and set `scaling_factor` to 1 / latent std.

    `latent_noise` (in units of the latents' standard deviation) makes the decoder tolerant of
    the small errors the diffusion head leaves.
    """
    parameters = list(autoencoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _cosine(s, steps))
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        pixels = next(batches)
        latents = autoencoder.encode(pixels).latent
        spread = latents.detach().std()
        noise = torch.randn(latents.shape, generator=generator)
        strength = latent_noise * torch.rand(len(pixels), 1, 1, 1, generator=generator)
        decoded = autoencoder.decode(latents + strength * spread * noise).sample
        # Keep the latents near unit scale: noise alone would let them grow without bound.
        size = (latents.pow(2).mean() - 1).pow(2)
        error = F.mse_loss(decoded, pixels)
        loss = error + F.l1_loss(decoded, pixels) + 0.01 * size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % CODEC_LOG_EVERY == 0 or step == steps - 1:
            log(step + 1, {"mse": error.item(), "latent_std": spread.item()})
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(next(batches)).latent for _ in range(10)])
    autoencoder.register_to_config(scaling_factor=float(1 / latents.std()))
