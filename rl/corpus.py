"""What pretraining reads: endless sequences of rows, and how rows become batches.

The row at a position depends on the run's seed and the position alone. Processes and loader workers
divide the positions, so neither their number nor an interruption changes what is trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.seeds import counter_seed
from data.pictures import Sample
from data.scenes import (
    Scene,
    caption,
    metadata,
    metadata_held_out,
    misdescribe,
    paint,
    sample_scene,
)
from policy.policy import Policy
from policy.prompts import PromptEncoder
from policy.sampling import left_pad
from recipes.schema_pretrain import ENCODED_AT_ONCE

Row = dict[str, Any]
_CHUNK = 2048


class Samples(Protocol):
    """A source of captioned pictures."""

    def __getitem__(self, position: int) -> Sample: ...


class SceneCorpus(Dataset[Row]):
    """Scenes of the training split as prompt ids, image codes and (if asked) latents.

    They are made a chunk at a time; chunk k depends on the seed and k alone. `caption_noise` is the
    share of captions with one wrong fact. With `seeded`, a row has a seed for its own draws.
    """

    def __init__(
        self,
        policy: Policy,
        tasks: Mapping[str, float],
        *,
        seed: int,
        length: int,
        caption_noise: float = 0.0,
        with_latents: bool = False,
        seeded: bool = True,
    ) -> None:
        self.policy = policy
        self.tasks = dict(tasks)
        self.seed = seed
        self.length = length
        self.caption_noise = caption_noise
        self.with_latents = with_latents
        self.seeded = seeded
        self._chunk: tuple[int, list[Row]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Row:
        chunk, place = divmod(position, _CHUNK)
        if chunk != self._chunk[0]:
            self._chunk = (chunk, self._make_chunk(chunk))
        row = self._chunk[1][place]
        return row | {"seed": _draw_seed(self.seed, position)} if self.seeded else row

    @torch.no_grad()
    def _make_chunk(self, index: int) -> list[Row]:
        rng = np.random.default_rng(counter_seed(self.seed, "pretrain-scenes", index))
        scenes = [sample_scene(rng, self.tasks, "train") for _ in range(_CHUNK)]
        pixels = _pixels(torch.from_numpy(np.stack([paint(scene) for scene in scenes])))
        wrong = rng.random(_CHUNK) < self.caption_noise
        captions = [
            _wrong_caption(scene, rng) if is_wrong else caption(scene)
            for scene, is_wrong in zip(scenes, wrong, strict=True)
        ]
        rows: list[Row] = [{"prompt_ids": ids} for ids in self.policy.prompt_ids(captions)]
        for start in range(0, _CHUNK, 256):
            batch = pixels[start : start + 256]
            codes = self.policy.encode_images(batch).cpu()
            latents = self.policy.encode_latents(batch).cpu() if self.with_latents else None
            for i in range(len(batch)):
                rows[start + i]["codes"] = codes[i]
                if latents is not None:
                    rows[start + i]["latents"] = latents[i]
        return rows


def _wrong_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Misdescribe the scene without stating a held-out combination, which must stay unseen."""
    while True:
        facts = metadata(misdescribe(scene, rng))
        if not metadata_held_out(facts):
            return str(facts["prompt"])


class PictureCorpus(Dataset[Row]):
    """Samples as rows of pixels and text; the trainer encodes them, on its own device."""

    def __init__(self, samples: Samples, *, seed: int, length: int) -> None:
        self.samples = samples
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Row:
        sample = self.samples[position]
        row: Row = {
            "caption": sample.caption,
            "pixels": torch.from_numpy(sample.image.copy()),
            "seed": _draw_seed(self.seed, position),
            "skipped": sample.skipped,
        }
        for key, picture in (
            ("reference", sample.reference),
            ("squashed", sample.squashed),
            ("squashed_reference", sample.squashed_reference),
        ):
            if picture is not None:
                row[key] = torch.from_numpy(picture.copy())
        return row


def _draw_seed(seed: int, position: int) -> int:
    return counter_seed(seed, "flow-matching", position)


def _pixels(pictures: Tensor) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1] of uint8 [B, H, W, 3]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


class Collator:
    """Stack rows into batches, left-padded, so that image tokens end every sequence.

    For a policy with the compatibility switch `tail_slice`, sequences are as the published training
    had them: the assistant's turn is closed behind the picture, and padding stands on the right.
    """

    def __init__(self, policy: Policy) -> None:
        config = policy.config
        self.pad_id = config.pad_id
        self.image_start_id = config.image_start_id
        self.ending: list[int] = []
        if "tail_slice" in config.compatibility:
            newline = policy.tokenizer("\n", add_special_tokens=False)["input_ids"]
            self.ending = [config.im_end_id, config.eos_id, *newline]

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        if "codes" in rows[0]:
            codes = torch.stack([row["codes"] for row in rows])
            batch |= self.sequences([row["prompt_ids"] for row in rows], codes)
        for key in ("latents", "pixels", "reference", "squashed", "squashed_reference"):
            if key in rows[0]:
                batch[key] = torch.stack([row[key] for row in rows])
        if "caption" in rows[0]:
            batch["captions"] = [row["caption"] for row in rows]
            batch["skipped"] = [text for row in rows for text in row["skipped"]]
        if "seed" in rows[0]:
            batch["seeds"] = [row["seed"] for row in rows]
        return batch

    def sequences(self, prompt_ids: Sequence[list[int]], codes: Tensor) -> dict[str, Tensor]:
        """Return input_ids and attention_mask [B, T] of prompts followed by codes [B, N]."""
        prompts, mask = left_pad(prompt_ids, self.pad_id, codes.device)
        ending = codes.new_tensor(self.ending).expand(len(codes), -1)
        ids = torch.cat([prompts, codes + self.image_start_id, ending], 1)
        mask = torch.cat([mask, torch.ones_like(codes), torch.ones_like(ending)], 1)
        if self.ending:  # turn each row round until its padding stands on the right
            places = torch.arange(ids.shape[1], device=ids.device) + mask.argmax(1, keepdim=True)
            places %= ids.shape[1]
            ids, mask = ids.gather(1, places), mask.gather(1, places)
        return {"input_ids": ids, "attention_mask": mask}


class BatchEncoder:
    """Turns a batch of pixels and captions into what `JointLoss` takes, with the frozen codecs.

    A sequence has at most `context` tokens: a caption that does not fit is cut at its end, and
    counted in `cut`.
    """

    def __init__(self, policy: Policy, collator: Collator, context: int, with_latents: bool):
        self.policy = policy
        self.collator = collator
        self.context = context
        self.with_latents = with_latents
        self.cut = 0
        self._prompts = PromptEncoder(policy.tokenizer)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return input_ids, attention_mask, seeds and, for flow matching, latents."""
        policy = self.policy
        encoded: dict[str, Any] = {"seeds": batch["seeds"]}
        reference_codes = None
        if "reference" in batch:
            reference_codes = self._codes(batch, "reference", "squashed_reference")[:, None]
            if self.with_latents and policy.config.routes:
                encoded["reference_latents"] = self._latents(batch["reference"])
        prompts = self.prompts(batch["captions"], reference_codes)
        encoded |= self.collator.sequences(prompts, self._codes(batch, "pixels", "squashed"))
        if self.with_latents:
            encoded["latents"] = self._latents(batch["pixels"])
        return encoded

    def _latents(self, squares: Tensor) -> Tensor:
        """Latents [B, C, S, S], a few at a time: nothing else of a step may take more memory."""
        parts = squares.split(ENCODED_AT_ONCE)
        return torch.cat([self.policy.encode_latents(_pixels(part)) for part in parts])

    def _codes(self, batch: dict[str, Any], square: str, squashed: str) -> Tensor:
        """Image codes [B, N] of the centre square, or of the whole picture where it is there."""
        return self.policy.encode_images(_pixels(batch.get(squashed, batch[square])))

    def prompts(
        self, captions: Sequence[str], reference_codes: Tensor | None = None
    ) -> list[list[int]]:
        """Return prompt ids that leave room for the image tokens."""
        config = self.policy.config
        room = self.context - config.num_tokens - len(self.collator.ending)
        rows = self._prompts.ids(config, captions, reference_codes)
        for i, text in enumerate(captions):
            if len(rows[i]) <= room:
                continue
            self.cut += 1
            codes = None if reference_codes is None else reference_codes[i : i + 1]
            fits, too_long = 0, len(text)
            while too_long - fits > 1:
                middle = (fits + too_long) // 2
                [ids] = self._prompts.ids(config, [text[:middle]], codes)
                if len(ids) <= room:
                    fits, rows[i] = middle, ids
                else:
                    too_long = middle
        return rows
