"""Build a policy, stage by stage: image tokenizer, autoencoder, pretraining, fine-tuning.

Each stage reads a policy folder, trains some of its parts and writes a policy folder.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Self

import torch

from common.atomic import atomic_dir, write_text
from common.errors import RunError
from common.journal import Journal
from common.lock import run_lock
from common.processes import is_main_process
from common.progress import Progress, SilentProgress
from common.seeds import counter_seed
from evals.policy_hash import policy_hash
from policy import Policy
from policy.quiet import quiet_libraries
from recipes import LoadedRecipe, Recipe, dump_recipe, load_recipe
from recipes.locate import located
from recipes.schema_pretrain import AutoencoderRecipe, ImageTokenizerRecipe, PretrainRecipe
from rl.checkpoints import (
    checkpoint_to_resume,
    newest_valid,
    refuse_other_processes,
    step_of,
)
from rl.codecs import scene_pixels, train_autoencoder, train_image_tokenizer
from rl.devices import repeatable_sums
from rl.preflight import check_installed, check_launch
from rl.pretrain import pretrain, task_weights
from rl.provenance import with_stage
from rl.start_policy import export_policy, load_start

CodecRecipe = ImageTokenizerRecipe | AutoencoderRecipe


class RunLog:
    """Writes what a run tells into its folder and onto the screen."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        progress: Progress,
        lock: AbstractContextManager[None],
        done: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.run_dir = run_dir
        self.progress = progress
        self._lock = lock
        self._done = done
        self._last = done or 0
        self._held = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def begin(self) -> None:
        """Take the folder, write the recipe, open the journal where the checkpoint left it.

        Only now, so that a run that cannot start leaves no folder behind.
        """
        self._held.enter_context(self._lock)
        if is_main_process():
            write_text(self.run_dir / "recipe.yaml", dump_recipe(self.recipe))
            self.journal = Journal(self.run_dir / "metrics.jsonl")
            self.journal.rewind(-1 if self._done is None else self._done)
        self.progress.start("train", self.recipe.train.steps)
        if self._last:
            self.progress.advance("train", self._last)

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write a row of numbers."""
        self.journal.write({"step": step, **numbers})
        facts = {k: f"{v:#.4g}" for k, v in numbers.items() if isinstance(v, float)}
        self.progress.advance("train", step - self._last, **dict(list(facts.items())[:3]))
        self._last = step

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """Write one event for each sample that could not be read."""
        for text in samples:
            self.journal.write({"event": "skipped", "step": step, "sample": text})
            self.progress.line(f"skipped {text}")


def build(loaded: LoadedRecipe, run_dir: Path, progress: Progress | None = None) -> None:
    """Run one stage; the result is `run_dir/policy`, the numbers are in `metrics.jsonl`."""
    recipe = loaded.recipe
    progress = progress or SilentProgress()
    if isinstance(recipe, PretrainRecipe):
        recipe = located(recipe, loaded.files)
        _pretrain(recipe, run_dir, progress, None, run_lock(run_dir))
        return
    assert isinstance(recipe, CodecRecipe)
    policy = load_start(recipe.policy.path, recipe.seed)
    start = policy_hash(policy)
    with RunLog(recipe, run_dir, progress, run_lock(run_dir)) as log:
        log.begin()
        with repeatable_sums(policy.device):
            _train_codec(policy, recipe, log)
        progress.finish("train")
        policy.config = with_stage(policy.config, recipe, start)
        with atomic_dir(run_dir / "policy") as staged:
            policy.save_pretrained(staged)


def resume(run_dir: Path, progress: Progress | None = None) -> None:
    """Go on from the newest whole checkpoint to the numbers an uninterrupted run gives."""
    progress = progress or SilentProgress()
    recipe = load_recipe(str(run_dir / "recipe.yaml")).recipe
    if not isinstance(recipe, PretrainRecipe):
        raise RunError(
            f"`{recipe.name}` is a {recipe.kind} recipe, whose runs cannot be resumed.\n"
            "    Fix: run the stage again with `atelier train` and another --out."
        )
    with run_lock(run_dir):
        checkpoint = checkpoint_to_resume(run_dir, progress)
        if checkpoint is not None and recipe.train.deepspeed:
            refuse_other_processes(checkpoint)
        _pretrain(recipe, run_dir, progress, checkpoint, nullcontext())


def _pretrain(
    recipe: PretrainRecipe,
    run_dir: Path,
    progress: Progress,
    checkpoint: Path | None,
    lock: AbstractContextManager[None],
) -> None:
    main = is_main_process()
    if not main:
        progress = SilentProgress()
    check_installed(recipe)
    check_launch(recipe.train.deepspeed)
    done = None if checkpoint is None else step_of(checkpoint)
    with quiet_libraries(), RunLog(recipe, run_dir, progress, lock, done) as log:
        pretrain(recipe, run_dir, log, progress, checkpoint)
        progress.finish("train")
        if not main:
            return
        newest, _ = newest_valid(run_dir / "checkpoints")
        assert newest is not None
        with atomic_dir(run_dir / "policy") as staged:
            export_policy(recipe, newest, staged)


def _train_codec(policy: Policy, recipe: CodecRecipe, log: RunLog) -> None:
    """Train the image codec that the recipe's kind names, in place."""
    torch.manual_seed(counter_seed(recipe.seed, "stage", recipe.name))
    train = recipe.train
    seed = counter_seed(recipe.seed, "pictures", recipe.name)
    batches = scene_pixels(seed, task_weights(recipe.data.tasks), train.batch_size)
    if isinstance(recipe, ImageTokenizerRecipe):
        train_image_tokenizer(
            policy.image_tokenizer,
            batches,
            steps=train.steps,
            unquantized_steps=recipe.train.unquantized_steps,
            learning_rate=train.learning_rate,
            log=log.row,
        )
    else:
        train_autoencoder(
            policy.vae,
            batches,
            steps=train.steps,
            learning_rate=train.learning_rate,
            latent_noise=recipe.train.latent_noise,
            log=log.row,
        )
