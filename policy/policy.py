"""The policy: language model, image tokenizer, connector, diffusion head and autoencoder."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from common.errors import PolicyError
from common.seeds import counter_seed
from policy.config import ROUTES, PolicyConfig
from policy.connector import Connector
from policy.diffusion import sample_latents
from policy.image_tokenizer import ImageTokenizer
from policy.pixels import decode_latents, square, to_images
from policy.prompts import PromptEncoder, check_length, prompt_text
from policy.quiet import quiet_libraries, refused_as
from policy.sampling import ImageTokenSampler, Sampling, evaluation_mode, left_pad
from policy.shared_prompt import tail_states

__all__ = ["Policy", "to_images"]

_T = TypeVar("_T")


class Policy(nn.Module):
    """Everything that turns a prompt into a picture, on disk as one folder (design: contracts).

    The language model's hidden states at `<S0>` and the N image tokens, 1 + N rows, condition the
    diffusion head (spec section 1.5: the correct slice, not the published tail slice). A policy
    that edits has, beside its connector, one for the latents of a reference picture.
    """

    def __init__(
        self,
        config: PolicyConfig,
        tokenizer: PreTrainedTokenizerFast,
        ar: Qwen3ForCausalLM,
        image_tokenizer: ImageTokenizer,
        connector: Connector,
        diffusion: SanaTransformer2DModel,
        vae: AutoencoderDC,
        scheduler_config: dict[str, Any],
        reference_connector: Connector | None = None,
    ) -> None:
        super().__init__()
        patch = int(diffusion.config.patch_size)
        if config.latent_size % patch:
            raise PolicyError(
                f"policy.json: latent_size is {config.latent_size}, and the diffusion head's "
                f"patch_size of {patch} does not divide it.\n    Fix: convert the policy again."
            )
        self.config = config
        self.tokenizer = tokenizer
        self.ar = ar
        self.image_tokenizer = image_tokenizer
        self.connector = connector
        self.diffusion = diffusion
        self.vae = vae
        self.scheduler_config = scheduler_config
        self.reference_connector = reference_connector
        self.upstream: dict[str, bytes] = {}
        """Files of a published checkpoint that no picture depends on, for the way back."""

    @property
    def device(self) -> torch.device:
        """Device of the language model."""
        return self.ar.device

    # --- folder ----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "Policy":
        """Read a policy folder; `PolicyError` names what is missing or damaged."""
        folder = Path(path)
        config = PolicyConfig.load(folder)
        with quiet_libraries():
            policy = cls(
                config,
                _read(folder / "tokenizer", AutoTokenizer.from_pretrained),
                _read(folder / "ar", lambda p: Qwen3ForCausalLM.from_pretrained(p, dtype=dtype)),
                _read(folder / "image_tokenizer", ImageTokenizer.from_pretrained).to(dtype),
                _read(folder / "connector", Connector.from_pretrained).to(dtype),
                _read(
                    folder / "diffusion",
                    lambda p: SanaTransformer2DModel.from_pretrained(p, torch_dtype=dtype),
                ),
                _read(
                    folder / "vae", lambda p: AutoencoderDC.from_pretrained(p, torch_dtype=dtype)
                ),
                _read(
                    folder / "scheduler",
                    lambda p: json.loads((p / "scheduler_config.json").read_text()),
                ),
                _read(folder / "reference_connector", Connector.from_pretrained).to(dtype)
                if "cross_attention" in config.routes or (folder / "reference_connector").is_dir()
                else None,
            )
        upstream = (folder / "upstream").glob("*")
        policy.upstream = {file.name: file.read_bytes() for file in upstream}
        return policy.to(device=device).eval()  # casting would round the rotary frequencies

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder; `dtype` (default: as held) is that of the stored weights."""
        if dtype not in (None, self.ar.dtype):
            # A copy: what is in memory keeps its precision.
            copy.deepcopy(self).to(dtype).save_pretrained(path)
            return
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder)
        with quiet_libraries():
            for part in ("tokenizer", "ar", "image_tokenizer", "connector", "diffusion", "vae"):
                getattr(self, part).save_pretrained(folder / part)
        if self.reference_connector is not None:
            self.reference_connector.save_pretrained(folder / "reference_connector")
        for name, data in self.upstream.items():
            (folder / "upstream").mkdir(exist_ok=True)
            (folder / "upstream" / name).write_bytes(data)
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(self.scheduler_config, indent=2) + "\n"
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides a picture besides weights and sampling, without its provenance."""
        parts = {
            "ar": self.ar.config.to_dict(),
            "diffusion": dict(self.diffusion.config),
            "vae": dict(self.vae.config),
            "scheduler": self.scheduler_config,
            "image_tokenizer": self.image_tokenizer.config,
        }
        facts = asdict(self.config)
        del facts["provenance"]
        return {
            "policy": facts,
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            **{name: _without_origin(config) for name, config in parts.items()},
        }

    # --- text ------------------------------------------------------------------------------

    def prompt_text(self, prompt: str, references: int = 0) -> str:
        """Return the chat template around `prompt`, ending in `<im_start><S0>`.

        Each of the `references` pictures is written as `<image>`.
        """
        return prompt_text(self.config, prompt, references)

    def prompt_ids(
        self, prompts: Sequence[str], references: Tensor | None = None
    ) -> list[list[int]]:
        """Return token ids of each prompt's full text; `references` [B, R, N] are image codes.

        Prompts stay text: `<I12>` in one cannot inject an image token. Raises `DataError` for a
        prompt that is too long for the language model.
        """
        ids = self._prompt_encoder.ids(self.config, prompts, references)
        context = int(self.ar.config.max_position_embeddings)
        check_length(ids, prompts, context - self.config.num_tokens)
        return ids

    @cached_property
    def _prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer)

    # --- pictures --------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return image codes int64 [B, N] of pixels [B, 3, H, W] in [-1, 1].

        Codes and latents describe the centre square, in the codecs' own type: mixed precision may
        cast the language model alone.
        """
        crop = "squashed_tokens" not in self.config.compatibility
        pixels = square(pixels, self.config.tokenizer_image_size, crop)
        return self.image_tokenizer.encode(pixels.to(next(self.image_tokenizer.parameters())))

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return scaled diffusion latents [B, C, S, S] of pixels [B, 3, H, W] in [-1, 1]."""
        pixels = square(pixels, self.config.image_size)
        latents = self.vae.encode(pixels.to(next(self.vae.parameters()))).latent
        return latents * self.vae.config.scaling_factor

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """One teacher-forced pass: hidden states and log-probs over the full vocabulary.

        Returns hidden [B, T, H] after the final norm and log-probs [B, T - 1] of
        `input_ids[:, 1:]`. The mask is honoured, so padded rows do not reach real ones.
        """
        hidden = self.hidden_states(input_ids, attention_mask)
        logits = self.ar.lm_head(hidden[:, :-1]).float()
        chosen = logits.gather(-1, input_ids[:, 1:, None])[..., 0]
        return hidden, chosen - logits.logsumexp(-1)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return hidden states [B, T, H] after the final norm of sequences padded on either side.

        Padding is masked, and positions count from a row's first real token.
        """
        first = attention_mask.argmax(1, keepdim=True)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden: Tensor = self.ar.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(places - first).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return hidden

    def image_places(self, input_ids: Tensor) -> Tensor:
        """Return where in `input_ids` [B, T] `<S0>` and the N image tokens stand: int64 [B, 1 + N].

        They follow the last `<im_start>` of each row, wherever the padding stands.
        """
        rows = 1 + self.config.num_tokens
        starts = input_ids == self.config.im_start_id
        first = input_ids.shape[1] - starts.flip(1).int().argmax(1)
        if not bool(starts.any(1).all()) or int(first.max()) + rows > input_ids.shape[1]:
            raise PolicyError(f"a sequence has no <im_start> that {rows} tokens follow.")
        return first[:, None] + torch.arange(rows, device=first.device)

    def conditions(
        self, hidden: Tensor, *, reference_latents: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Return what the diffusion head attends to: [B, R, width].

        R is 1 + N rows of hidden states [B, 1 + N, H] and, with `reference_latents` [B, C, S, S]
        (the cross-attention route), S * S rows of the reference. Where `kept` bool [B] is false,
        the row is the null condition: zeros before the connector for hidden states, after it for
        the reference. Training dropout and the null branch of guidance are thus the same.
        """
        if kept is not None:
            hidden = hidden * kept.view(-1, 1, 1).to(hidden.dtype)
        conditions: Tensor = self.connector(hidden)
        if reference_latents is None:
            return conditions
        if self.reference_connector is None:
            raise PolicyError("This policy has no reference connector for cross-attention.")
        reference = self.reference_connector(reference_latents.flatten(2).transpose(1, 2))
        if kept is not None:
            reference = reference * kept.view(-1, 1, 1).to(reference.dtype)
        return torch.cat([conditions, reference], dim=1)

    def null_conditions(self, reference: bool = False) -> Tensor:
        """Return the null condition [1, R, width]: connector(0), and zeros for a reference."""
        config = self.config
        like = {"device": self.device, "dtype": self.ar.dtype}
        count = 1 + config.num_tokens
        # Without positions one row for all, so that they are equal to the last bit.
        different = 1 if self.connector.position is None else count
        hidden = torch.zeros(1, different, self.ar.config.hidden_size, **like)
        null: Tensor = self.connector(hidden).expand(-1, count, -1)
        if not reference:
            return null
        return torch.cat([null, null.new_zeros(1, config.latent_size**2, null.shape[-1])], dim=1)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Return initial latents [B, C, S, S], each row a function of its own seed alone."""
        shape = (self.config.latent_channels, self.config.latent_size, self.config.latent_size)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device, self.ar.dtype)

    @torch.no_grad()
    def render(
        self,
        hidden: Tensor,
        *,
        noise: Tensor | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        compiled: bool = False,
        tile: int | None = None,
        references: Tensor | None = None,
        routes: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Return pictures [B, 3, H, W] in [0, 1] of hidden states [B, 1 + N, H].

        Give the initial `noise` [B, C, S, S] or a `seed` from which one is drawn per row.
        `references` [B or 1, 3, H, W] in [-1, 1] reach the head by `routes` (default: the
        policy's), a subset of `policy.config.ROUTES`. `tile` is that of `decode_latents`. The rest
        is that of `sample_latents`.
        """
        if noise is None:
            noise = self.noise([counter_seed(seed or 0, "noise", i) for i in range(len(hidden))])
        routes = self._routes(references, routes)
        latents = None
        if references is not None and routes:
            latents = self.encode_latents(references).to(hidden.dtype)
            latents = latents.expand(len(hidden), -1, -1, -1)
        attended = latents if "cross_attention" in routes else None
        latents = sample_latents(
            self.diffusion,
            self.scheduler_config,
            self.conditions(hidden, reference_latents=attended),
            self.null_conditions(reference=attended is not None),
            noise.to(hidden.dtype),
            steps=steps or self.config.steps,
            guidance=self.config.guidance if guidance is None else guidance,
            guidance_interval=guidance_interval,
            compiled=compiled,
            reference_latents=latents if "noise_space" in routes else None,
        )
        return decode_latents(self.vae, latents, tile)

    def _routes(self, references: Tensor | None, routes: Sequence[str] | None) -> Sequence[str]:
        if references is None:
            if routes:
                raise PolicyError("Routes were given, but no reference pictures to send by them.")
            return ()
        routes = self.config.routes if routes is None else routes
        if unknown := sorted(set(routes) - set(ROUTES)):
            raise PolicyError(f"There is no route {unknown[0]!r}; there are {', '.join(ROUTES)}.")
        return routes

    @torch.no_grad()
    def condition_rows(self, prompt_ids: Sequence[list[int]], completion_ids: Tensor) -> Tensor:
        """Return the conditioning hidden states [B, 1 + N, H] of prompts and their image tokens.

        One teacher-forced pass over left-padded sequences with a mask, without dropout, as the
        samplers see the model; rows are `<S0>` and the N image tokens.
        """
        prompts, mask = left_pad(prompt_ids, self.config.pad_id, self.device)
        ids = torch.cat([prompts, completion_ids.to(self.device)], 1)
        mask = torch.cat([mask, torch.ones_like(completion_ids, device=self.device)], 1)
        with evaluation_mode(self.ar):
            return tail_states(self.ar.model, ids, mask, 1 + self.config.num_tokens)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        references: Tensor | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Image.Image]:
        """Return one picture per prompt.

        Picture i depends on its prompt and on `seeds[i]` (or on `seed` and i), not on the batch.
        `references` [B or 1, 3, H, W] in [-1, 1] are pictures to edit: their image tokens join the
        prompt and they reach the head by the policy's routes.
        """
        if seeds is None:
            seeds = [counter_seed(seed or 0, "sample", i) for i in range(len(prompts))]
        codes, config = None, self.config
        if references is not None:
            self.prompt_text("", references=1)  # before any work: does it take references?
            codes = self.encode_images(references)[:, None].expand(len(prompts), -1, -1)
        ids = self.prompt_ids(prompts, codes)
        images = (config.image_start_id, config.num_image_tokens, config.num_tokens)
        sampler = ImageTokenSampler(self.ar, *images, config.pad_id)
        token_seeds = [counter_seed(s, "tokens") for s in seeds]
        sampling = Sampling(temperature, top_k, top_p)
        completions, _ = sampler.sample(ids, 1, sampling, token_seeds)
        noise = self.noise([counter_seed(s, "noise") for s in seeds])
        hidden = self.condition_rows(ids, completions)
        return to_images(
            self.render(hidden, noise=noise, steps=steps, guidance=guidance, references=references)
        )


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out a library's notes on versions, paths and number formats."""
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("transformers_version", "dtype", "torch_dtype")
    }


def _read(folder: Path, load: Callable[[Path], _T]) -> _T:
    """Load one part of a policy; whatever its library says becomes a PolicyError that names it."""
    if not folder.is_dir():
        raise PolicyError(f"{folder} is missing.\n    Fix: copy the whole policy folder again.")
    with refused_as(f"{folder} cannot be loaded", "copy the whole policy folder again."):
        return load(folder)
