"""Joint pretraining and fine-tuning: cross-entropy on image tokens plus flow matching.

A `transformers.Trainer` around `JointLoss`. Which parts learn and how the two losses weigh is the
recipe's choice; the base policy trains them one after the other (the head on a finished language
model), because a small head trained beside a moving one does not follow the tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from common.seeds import counter_seed
from data.scenes import (
    TASKS,
    Scene,
    caption,
    metadata,
    metadata_held_out,
    misdescribe,
    paint,
    sample_scene,
)
from policy.diffusion import flow_matching_loss
from policy.policy import Policy
from policy.sampling import left_pad
from recipes.schema_pretrain import PretrainRecipe
from rl.optimizers import MuonAdamW

OnLog = Callable[[int, dict[str, float]], None]
_CHUNK = 2048


class SceneCorpus(IterableDataset[dict[str, Any]]):
    """Endless stream of training scenes as prompt ids, image codes and (if asked) latents.

    Chunk k depends on the seed and k alone, so a resumed run sees the same pictures.
    `caption_noise` is the share of captions with one wrong fact.
    """

    def __init__(
        self,
        policy: Policy,
        tasks: Mapping[str, float],
        *,
        seed: int,
        caption_noise: float = 0.0,
        with_latents: bool = False,
    ) -> None:
        self.policy = policy
        self.tasks = dict(tasks)
        self.seed = seed
        self.caption_noise = caption_noise
        self.with_latents = with_latents

    def __iter__(self) -> Iterator[dict[str, Any]]:
        chunk = 0
        while True:
            yield from self._chunk(chunk)
            chunk += 1

    @torch.no_grad()
    def _chunk(self, index: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(counter_seed(self.seed, "pretrain-scenes", index))
        scenes = [sample_scene(rng, self.tasks, "train") for _ in range(_CHUNK)]
        pixels = torch.from_numpy(np.stack([paint(scene) for scene in scenes]))
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        wrong = rng.random(_CHUNK) < self.caption_noise
        captions = [
            _wrong_caption(scene, rng) if is_wrong else caption(scene)
            for scene, is_wrong in zip(scenes, wrong, strict=True)
        ]
        prompt_ids = self.policy.prompt_ids(captions)
        for start in range(0, _CHUNK, 256):
            batch = pixels[start : start + 256]
            codes = self.policy.encode_images(batch)
            latents = self.policy.encode_latents(batch) if self.with_latents else None
            for i in range(len(batch)):
                row = {"prompt_ids": prompt_ids[start + i], "codes": codes[i]}
                if latents is not None:
                    row["latents"] = latents[i]
                yield row


def _wrong_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Misdescribe the scene without stating a held-out combination, which must stay unseen."""
    while True:
        facts = metadata(misdescribe(scene, rng))
        if not metadata_held_out(facts):
            return str(facts["prompt"])


class Collator:
    """Stack rows into left-padded batches, so that image tokens end every sequence."""

    def __init__(self, pad_id: int, image_start_id: int) -> None:
        self.pad_id = pad_id
        self.image_start_id = image_start_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts, mask = left_pad([row["prompt_ids"] for row in rows], self.pad_id)
        codes = torch.stack([row["codes"] for row in rows])
        batch = {
            "input_ids": torch.cat([prompts, codes + self.image_start_id], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(codes)], 1),
        }
        if "latents" in rows[0]:
            batch["latents"] = torch.stack([row["latents"] for row in rows])
        return batch


class JointLoss(nn.Module):
    """The loss of a batch: weights times cross-entropy (nats per token) and flow matching (MSE).

    Cross-entropy is taken over the image rows of the vocabulary, the only legal tokens.
    `condition_dropout` sets a sample's hidden states to zero before the connector, which is the
    null condition of sampling; `hidden_noise` (in units of their standard deviation) is added to
    the others, so that the head tolerates the drift that RL causes.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        cross_entropy: float,
        flow_matching: float,
        condition_dropout: float = 0.1,
        hidden_noise: float = 0.0,
        compile_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.weights = {"cross_entropy": cross_entropy, "flow_matching": flow_matching}
        self.condition_dropout = condition_dropout
        self.hidden_noise = hidden_noise
        self.last: dict[str, float] = {}
        backbone = policy.ar.model
        # In a list, so that the compiled wrapper is not registered as a second submodule.
        self._backbone = [torch.compile(backbone, dynamic=True) if compile_backbone else backbone]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, latents: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"loss": scalar}; the parts are left in `self.last` for the log."""
        policy, config = self.policy, self.policy.config
        rows = 1 + config.num_tokens
        learns = any(p.requires_grad for p in policy.ar.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            hidden = self._backbone[0](
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state[:, -rows:]
        loss = torch.zeros((), device=hidden.device)
        if self.weights["cross_entropy"]:
            first = config.image_start_id
            head = policy.ar.lm_head.weight[first : first + config.num_image_tokens]
            logits = F.linear(hidden[:, :-1], head)
            targets = input_ids[:, -config.num_tokens :] - first
            entropy = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            loss = loss + self.weights["cross_entropy"] * entropy
            self.last["cross_entropy"] = entropy.item()
        if self.weights["flow_matching"]:
            assert latents is not None
            matching = self._flow_matching(hidden, latents)
            loss = loss + self.weights["flow_matching"] * matching
            self.last["flow_matching"] = matching.item()
        return {"loss": loss}

    def _flow_matching(self, hidden: Tensor, latents: Tensor) -> Tensor:
        batch, device = len(hidden), hidden.device
        if self.hidden_noise:
            hidden = hidden + self.hidden_noise * hidden.std() * torch.randn_like(hidden)
        kept = torch.rand(batch, 1, 1, device=device) >= self.condition_dropout
        conditions = self.policy.connector(hidden * kept)
        time = torch.rand(batch, device=device).clamp(min=1e-3)
        noise = torch.randn_like(latents)
        return flow_matching_loss(self.policy.diffusion, latents, conditions, noise, time)


class JointTrainer(Trainer):
    """`transformers.Trainer` on `JointLoss` that logs the two losses apart."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the weighted sum; the parts are in the model's `last`."""
        loss: Tensor = model(**inputs)["loss"]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add both losses of the last batch."""
        joint: JointLoss = self.accelerator.unwrap_model(self.model)
        super().log({**logs, **joint.last}, *args, **kwargs)


def pretrain(policy: Policy, recipe: PretrainRecipe, out_dir: Path, on_log: OnLog) -> None:
    """Train the recipe's parts of `policy` in place; `on_log` gets each logged row."""
    policy.requires_grad_(False)
    for part in recipe.trainable:
        getattr(policy, part).requires_grad_(True)
    loss, train = recipe.loss, recipe.train
    joint = JointLoss(
        policy,
        cross_entropy=loss.cross_entropy,
        flow_matching=loss.flow_matching,
        condition_dropout=loss.condition_dropout,
        hidden_noise=loss.hidden_noise,
        compile_backbone=train.compile,
    )
    named = [(name, p) for name, p in joint.named_parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = (
        MuonAdamW(named, train.learning_rate, train.weight_decay)
        if train.optimizer == "muon"
        else torch.optim.AdamW(
            [p for _, p in named], lr=train.learning_rate, weight_decay=train.weight_decay
        )
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: trapezoid(step, train.steps, train.warmup_steps, train.decay_steps)
    )
    corpus = SceneCorpus(
        policy,
        task_weights(recipe.data.tasks),
        seed=recipe.seed,
        caption_noise=recipe.data.caption_noise,
        with_latents=bool(loss.flow_matching),
    )
    arguments = TrainingArguments(
        output_dir=str(out_dir),
        seed=recipe.seed % 2**32,
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        max_grad_norm=train.grad_clip or 0.0,
        use_cpu=policy.device.type == "cpu",
        logging_steps=min(50, train.steps),
        save_strategy="no",
        report_to=list(recipe.log.trackers),
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = JointTrainer(
        model=joint,
        args=arguments,
        train_dataset=corpus,
        data_collator=Collator(policy.config.pad_id, policy.config.image_start_id),
        optimizers=(optimizer, schedule),
        callbacks=[RowCallback(on_log)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def task_weights(tasks: Mapping[Any, float] | None) -> dict[str, float]:
    """Return the recipe's task weights; all tasks alike where it names none."""
    return {str(task): weight for task, weight in (tasks or dict.fromkeys(TASKS, 1.0)).items()}


def trapezoid(step: int, steps: int, warmup: int, decay: int) -> float:
    """Return the learning-rate factor: a ramp up, a plateau, a ramp down to 2 %."""
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    down = min(1.0, max(0.02, (steps - step) / decay)) if decay else 1.0
    return up * down


class RowCallback(TrainerCallback):
    """Hand every logged row to a function."""

    def __init__(self, on_log: OnLog) -> None:
        self._give = on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Pass the step and its numbers on."""
        self._give(state.global_step, logs or {})
