"""The policy: language model, image tokenizer, connector, diffusion head and autoencoder."""

import copy
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from PIL import Image
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from common.errors import PolicyError
from common.seeds import counter_seed
from policy.config import PolicyConfig
from policy.connector import Connector
from policy.diffusion import sample_latents
from policy.image_tokenizer import ImageTokenizer
from policy.quiet import quiet_libraries
from policy.sampling import ImageTokenSampler, Sampling, evaluation_mode, left_pad

_T = TypeVar("_T")


class Policy(nn.Module):
    """Everything that turns a prompt into a picture, on disk as one folder (design: contracts).

    The language model's hidden states at `<S0>` and the N image tokens, 1 + N rows, condition the
    diffusion head (spec section 1.5: the correct slice, not the published tail slice).
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
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.ar = ar
        self.image_tokenizer = image_tokenizer
        self.connector = connector
        self.diffusion = diffusion
        self.vae = vae
        self.scheduler_config = scheduler_config

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
                _read(folder / "image_tokenizer", ImageTokenizer.from_pretrained),
                _read(folder / "connector", Connector.from_pretrained),
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
            )
        return policy.to(device=device, dtype=dtype).eval()

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
            self.tokenizer.save_pretrained(folder / "tokenizer")
            self.ar.save_pretrained(folder / "ar")
            self.image_tokenizer.save_pretrained(folder / "image_tokenizer")
            self.connector.save_pretrained(folder / "connector")
            self.diffusion.save_pretrained(folder / "diffusion")
            self.vae.save_pretrained(folder / "vae")
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(self.scheduler_config, indent=2) + "\n"
        )

    # --- text ------------------------------------------------------------------------------

    def prompt_text(self, prompt: str, references: int = 0) -> str:
        """Return the chat template around `prompt`, ending in `<im_start><S0>`."""
        if references:
            raise PolicyError(
                "This policy takes no reference pictures; use one with edit connectors."
            )
        return self.config.prompt_template.replace("{prompt}", prompt) + "<im_start><S0>"

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return token ids of each prompt's full text.

        The prompt itself is tokenised apart from the template, by a tokenizer without added
        tokens, so text such as `<I12>` stays text and cannot inject image tokens.
        """
        before, after = self.prompt_text("{prompt}").split("{prompt}")
        head = self._ids(before)
        tail = self._ids(after)
        encoded = self._text_tokenizer.encode_batch(list(prompts), add_special_tokens=False)
        return [head + text.ids + tail for text in encoded]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _text_tokenizer(self) -> Tokenizer:
        facts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        plain: dict[str, Any] = {"added_tokens": [], "padding": None, "truncation": None}
        return Tokenizer.from_str(json.dumps(facts | plain))

    # --- pictures --------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return image codes int64 [B, N] of pixels [B, 3, H, W] in [-1, 1]."""
        side = self.config.tokenizer_image_size
        if pixels.shape[-2:] != (side, side):
            pixels = nn.functional.interpolate(
                pixels, (side, side), mode="bicubic", antialias=True, align_corners=False
            )
        return self.image_tokenizer.encode(pixels.to(self.device, self.ar.dtype))

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return scaled diffusion latents [B, C, S, S] of pixels [B, 3, H, W] in [-1, 1]."""
        latents = self.vae.encode(pixels.to(self.device, self.ar.dtype)).latent
        return latents * self.vae.config.scaling_factor

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """One teacher-forced pass: hidden states and log-probs over the full vocabulary.

        Returns hidden [B, T, H] after the final norm and log-probs [B, T - 1] of
        `input_ids[:, 1:]`. The mask is honoured, so padded rows do not reach real ones.
        """
        hidden = self._hidden_states(input_ids, attention_mask)
        logits = self.ar.lm_head(hidden[:, :-1]).float()
        chosen = logits.gather(-1, input_ids[:, 1:, None])[..., 0]
        return hidden, chosen - logits.logsumexp(-1)

    def _hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, T, H] after the final norm; padding is masked and takes no position."""
        return self.ar.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state

    def null_conditions(self) -> Tensor:
        """Return the one null condition, connector(0), [1, 1 + N, width]."""
        rows, width = 1 + self.config.num_tokens, self.ar.config.hidden_size
        return self.connector(torch.zeros(1, rows, width, device=self.device, dtype=self.ar.dtype))

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
        seed: int | None = None,
    ) -> Tensor:
        """Return pictures [B, 3, H, W] in [0, 1] of hidden states [B, 1 + N, H].

        Give the initial `noise` [B, C, S, S] or a `seed` from which one is drawn per row.
        """
        if noise is None:
            noise = self.noise([counter_seed(seed or 0, "noise", i) for i in range(len(hidden))])
        latents = sample_latents(
            self.diffusion,
            self.scheduler_config,
            self.connector(hidden),
            self.null_conditions(),
            noise.to(hidden.dtype),
            steps=steps or self.config.steps,
            guidance=self.config.guidance if guidance is None else guidance,
        )
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

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
            hidden = self._hidden_states(ids, mask)
        return hidden[:, -(1 + self.config.num_tokens) :]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        references: Tensor | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Image.Image]:
        """Return one picture per prompt.

        Picture i depends on its prompt and on `seeds[i]` (or on `seed` and i), not on the batch.
        """
        if references is not None:
            raise PolicyError(
                "This policy takes no reference pictures; use one with edit connectors."
            )
        if seeds is None:
            seeds = [counter_seed(seed or 0, "sample", i) for i in range(len(prompts))]
        ids = self.prompt_ids(prompts)
        sampler = ImageTokenSampler(
            self.ar,
            self.config.image_start_id,
            self.config.num_image_tokens,
            self.config.num_tokens,
            self.config.pad_id,
        )
        token_seeds = [counter_seed(s, "tokens") for s in seeds]
        completions, _ = sampler.sample(ids, 1, Sampling(temperature), token_seeds)
        noise = self.noise([counter_seed(s, "noise") for s in seeds])
        hidden = self.condition_rows(ids, completions)
        return to_images(self.render(hidden, noise=noise, steps=steps, guidance=guidance))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Return PIL pictures of pixels [B, 3, H, W] in [0, 1]."""
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def _read(folder: Path, load: Callable[[Path], _T]) -> _T:
    """Load one part of a policy; whatever its library says becomes a PolicyError that names it."""
    if not folder.is_dir():
        raise PolicyError(f"{folder} is missing.\n    Fix: copy the whole policy folder again.")
    try:
        return load(folder)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PolicyError(
            f"{folder} cannot be loaded: {told}\n    Fix: copy the whole policy folder again."
        ) from error
