"""Models with random weights for `benchmarks.gpu`, and a step of both ways."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_rows import GROUP, PROMPT, Size
from policy.sampling import ImageTokenSampler, Sampling


def language_model(config: dict[str, Any], size: Size) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device(size.device):
        model = Qwen3ForCausalLM(Qwen3Config(**config))
    return model.to(size.dtype).eval()


class Renderer:
    """Connector, head and autoencoder with random weights."""

    def __init__(self, size: Size) -> None:
        from diffusers import AutoencoderDC, SanaTransformer2DModel

        from policy.connector import Connector

        self.size = size
        self.hidden = next(iter(size.models.values()))["hidden_size"]
        torch.manual_seed(0)
        with torch.device(size.device):
            self.connector = Connector(self.hidden, size.sana["caption_channels"])
            self.head = SanaTransformer2DModel(**size.sana)
            self.vae = AutoencoderDC(**size.vae)
        for part in (self.connector, self.head, self.vae):
            part.to(size.dtype).eval()

    def inputs(self, count: int, latent: int) -> tuple[Tensor, Tensor]:
        """Return random hidden states and noise."""
        like = {"device": self.size.device, "dtype": self.size.dtype}
        shape = (count, int(self.size.sana["in_channels"]), latent, latent)
        return torch.randn(count, 1 + self.size.tokens, self.hidden, **like), torch.randn(
            shape, **like
        )

    @torch.no_grad()
    def ours(
        self,
        hidden: Tensor,
        noise: Tensor,
        steps: int,
        guidance: float,
        compiled: bool = False,
    ) -> Tensor:
        """Latents by the way of `Policy.render`."""
        from policy.diffusion import sample_latents

        conditions = (self.connector(hidden), self.connector(torch.zeros_like(hidden[:1])))
        options = {"steps": steps, "guidance": guidance, "compiled": compiled}
        return sample_latents(self.head, {}, *conditions, noise, **options)

    @torch.no_grad()
    def loop(self, hidden: Tensor, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Latents by the published loop, the connector inside; guidance 1 has one branch."""
        both = hidden if guidance == 1 else torch.cat([torch.zeros_like(hidden), hidden])
        latents = noise
        for index in range(steps):
            time_now = torch.full((len(both),), 1000 * (1 - index / steps), device=noise.device)
            given = latents if guidance == 1 else torch.cat([latents, latents])
            velocity = self.head(given, self.connector(both), timestep=time_now).sample
            if guidance != 1:
                null, conditioned = velocity.chunk(2)
                velocity = null + guidance * (conditioned - null)
            latents = latents - velocity / steps
        return latents

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """Decode latents."""
        return self.vae.decode(latents).sample

    def flops(self, latent: int, steps: int, guidance: float) -> int:
        """Operations a picture of the published loop: what both ways would have to do."""
        from policy.anatomy import Anatomy, Part
        from rl.flops import connector_flops, head_flops

        parts = {
            name: Part({k: tuple(v.shape) for k, v in part.named_parameters()}, config)
            for name, part, config in (
                ("connector", self.connector, {}),
                ("diffusion", self.head, dict(self.head.config)),
            )
        }
        size = self.size
        anatomy = Anatomy(parts, size.tokens, size.image_tokens, latent, PROMPT, "random weights")
        calls = steps * (1 if guidance == 1 else 2)
        return calls * head_flops(anatomy) + connector_flops(anatomy)


def update_step(model: Any, size: Size, lora: Any) -> Callable[[], None]:
    """Return forward and backward pass of one micro-batch over the image rows."""
    from rl.image_head import add_image_head

    add_image_head(model, size.image_start, size.image_tokens, 1.0)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model,
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)),
        )
    model.train()
    ids = _sequences(size, size.micro_batch)

    def run() -> None:
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), image_tokens=size.tokens)
        out.log_probs.mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def _sequences(size: Size, count: int) -> Tensor:
    prompt = torch.ones(count, PROMPT, dtype=torch.int64)
    image = torch.randint(
        size.image_start, size.image_start + size.image_tokens, (count, size.tokens)
    )
    return torch.cat([prompt, image], 1).to(size.device)


def _pieces(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def our_step(model: Any, renderer: Renderer, size: Size, settings: tuple[int, int, float]) -> None:
    latent, steps, guidance = settings
    sampler = ImageTokenSampler(model, size.image_start, size.image_tokens, size.tokens, 0, 512)
    group = min(GROUP, size.images)
    prompts = [[1] * PROMPT] * (size.images // group)
    tokens, _ = sampler.sample(prompts, group, Sampling(), list(range(size.images)))
    ids = torch.cat([torch.ones(size.images, PROMPT, dtype=torch.int64).to(tokens), tokens], 1)
    for rows in _pieces(size.images, 2 * size.micro_batch):
        with torch.no_grad():
            hidden = model.model(ids[rows], use_cache=False).last_hidden_state
        noise = renderer.inputs(len(hidden), latent)[1]
        renderer.pixels(
            renderer.ours(hidden[:, -1 - size.tokens :], noise, steps, guidance)
        ).float().cpu()
    train = update_step(model, size, None)
    for _ in _pieces(size.images, size.micro_batch):
        train()
    del model.forward


def published_step(
    model: Any, renderer: Renderer, size: Size, settings: tuple[int, int, float]
) -> None:
    """In micro-batches where the published code would run out of memory."""
    from trl.trainer.utils import selective_log_softmax

    latent, steps, guidance = settings
    prompt = torch.ones(size.images, PROMPT, dtype=torch.int64, device=size.device)
    model.eval()
    with torch.no_grad():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            max_new_tokens=size.tokens,
            min_new_tokens=size.tokens,
            top_k=0,
            pad_token_id=0,
        )
        for rows in _pieces(size.images, 2 * size.micro_batch):
            hidden = model.model(ids[rows], output_hidden_states=True, use_cache=False)
            hidden = hidden.hidden_states[-1][:, -1 - size.tokens :]
            noise = renderer.inputs(len(hidden), latent)[1]
            renderer.pixels(renderer.loop(hidden, noise, steps, guidance)).float().cpu()
    model.train()
    for rows in _pieces(size.images, max(size.micro_batch // 4, 1)):
        logits = model(ids[rows], logits_to_keep=size.tokens + 1, use_cache=False).logits[:, :-1]
        selective_log_softmax(logits, ids[rows, -size.tokens :]).mean().backward()
        model.zero_grad(set_to_none=True)
