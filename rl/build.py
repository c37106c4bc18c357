"""Build a policy from nothing, stage by stage: image tokenizer, autoencoder, pretraining.

Each stage reads a policy folder, trains some of its parts and writes a policy folder.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.atomic import write_text
from common.errors import RecipeError
from common.journal import Journal
from common.progress import Progress, SilentProgress
from common.seeds import counter_seed
from data.scenes import TASKS, caption, sample_scene
from policy import Policy
from policy.text import build_tokenizer
from policy.tiny import (
    CODES,
    tiny_autoencoder,
    tiny_config,
    tiny_head,
    tiny_image_tokenizer,
    tiny_language_model,
)
from recipes import LoadedRecipe, dump_recipe
from recipes.schema_pretrain import AutoencoderRecipe, ImageTokenizerRecipe, PretrainRecipe
from rl.codecs import scene_pixels, train_autoencoder, train_image_tokenizer
from rl.pretrain import pretrain, task_weights

TEXT_VOCABULARY = 360
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
StageRecipe = ImageTokenizerRecipe | AutoencoderRecipe | PretrainRecipe


def new_tiny_policy(seed: int) -> Policy:
    """Return a tiny policy with random weights and a tokenizer fitted to scene captions."""
    import numpy as np

    rng = np.random.default_rng(counter_seed(seed, "captions"))
    tasks = dict.fromkeys(TASKS, 1.0)
    captions = [caption(sample_scene(rng, tasks, "train")) for _ in range(3000)]
    tokenizer = build_tokenizer(captions, TEXT_VOCABULARY, CODES)
    config = tiny_config(tokenizer)
    torch.manual_seed(counter_seed(seed, "weights"))
    language_model = tiny_language_model(len(tokenizer), config.pad_id, config.eos_id)
    connector, head = tiny_head(language_model.config.hidden_size)
    return Policy(
        config,
        tokenizer,
        language_model,
        tiny_image_tokenizer(),
        connector,
        head,
        tiny_autoencoder(),
        dict(SCHEDULER),
    )


def build(loaded: LoadedRecipe, run_dir: Path, progress: Progress | None = None) -> None:
    """Run one stage; the result is `run_dir/policy`, the numbers are in `metrics.jsonl`."""
    recipe = loaded.recipe
    assert isinstance(recipe, StageRecipe)
    _refuse_what_is_missing(recipe)
    progress = progress or SilentProgress()
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
    journal = Journal(run_dir / "metrics.jsonl")
    policy = (
        new_tiny_policy(recipe.seed)
        if recipe.policy.path is None
        else Policy.from_pretrained(recipe.policy.path)
    )
    progress.start("train", recipe.train.steps)
    run_stage(policy, recipe, run_dir, _logger(journal, progress))
    progress.finish("train")
    stages = [*policy.config.provenance.get("stages", []), recipe.name]
    policy.config = replace(policy.config, provenance={"stages": stages, "seed": recipe.seed})
    staged = run_dir / "policy.partial"
    shutil.rmtree(staged, ignore_errors=True)
    policy.save_pretrained(staged)
    staged.rename(run_dir / "policy")


def _refuse_what_is_missing(recipe: StageRecipe) -> None:
    """Raise RecipeError for values of the schema that this version does not act on."""
    served = {
        "data.source": (recipe.data.source, "scenes"),
        "data.split": (recipe.data.split, "train"),
        "policy.dtype": (recipe.policy.dtype, "float32"),
    }
    for key, (value, only) in served.items():
        if value != only:
            raise RecipeError(
                f"{recipe.name}: {key} is {value!r}, which building a policy does not support.\n"
                f"    Fix: write {key}: {only}"
            )
    if recipe.policy.device == "cuda":
        raise RecipeError(
            f"{recipe.name}: policy.device is 'cuda', which building a policy does not support."
            "\n    Fix: write policy.device: auto"
        )
    if isinstance(recipe, ImageTokenizerRecipe):
        train = recipe.train
        if train.unquantized_steps >= train.steps:
            raise RecipeError(
                f"{recipe.name}: train.unquantized_steps is {train.unquantized_steps} of "
                f"{train.steps} steps, so the codebook would never be placed.\n"
                "    Fix: lower train.unquantized_steps or raise train.steps"
            )


def run_stage(
    policy: Policy,
    recipe: StageRecipe,
    run_dir: Path,
    log: Callable[[int, dict[str, float]], None],
) -> None:
    """Train the parts of `policy` that the recipe's kind names, in place."""
    torch.manual_seed(counter_seed(recipe.seed, "stage", recipe.name))
    if isinstance(recipe, PretrainRecipe):
        pretrain(policy.train(), recipe, run_dir, log)
        policy.eval()
        return
    train = recipe.train
    tasks = task_weights(recipe.data.tasks)
    seed = counter_seed(recipe.seed, "pictures", recipe.name)
    batches = scene_pixels(seed, tasks, train.batch_size)
    if isinstance(recipe, ImageTokenizerRecipe):
        train_image_tokenizer(
            policy.image_tokenizer,
            batches,
            steps=train.steps,
            warmup_steps=recipe.train.unquantized_steps,
            learning_rate=train.learning_rate,
            log=log,
        )
    else:
        train_autoencoder(
            policy.vae,
            batches,
            steps=train.steps,
            learning_rate=train.learning_rate,
            latent_noise=recipe.train.latent_noise,
            log=log,
        )


def _logger(journal: Journal, progress: Progress) -> Callable[[int, dict[str, float]], None]:
    last = 0

    def log(step: int, row: dict[str, Any]) -> None:
        nonlocal last
        journal.write({"step": step, **row})
        facts = {k: f"{v:.4f}" for k, v in row.items() if isinstance(v, float)}
        progress.advance("train", step - last, **dict(list(facts.items())[:3]))
        last = step

    return log
