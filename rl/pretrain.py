"""Joint pretraining and fine-tuning: a `transformers.Trainer` around `JointLoss`.

Which parts learn and how the two losses weigh is the recipe's choice; the base policy trains them
one after the other (the head on a finished language model), because a small head trained beside a
moving one does not follow the tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.errors import DataError, Interrupted, RunError
from common.progress import Progress
from data.scene_edits import SceneEdits
from data.scenes import TASKS
from data.shards import Shards
from policy.policy import Policy
from recipes.schema_pretrain import PretrainRecipe
from rl.callbacks import InterruptCallback
from rl.checkpoints import published
from rl.corpus import BatchEncoder, Collator, PictureCorpus, Row, SceneCorpus
from rl.devices import repeatable_sums, use_one_gpu
from rl.ema import EmaCallback
from rl.joint_loss import PARTS, JointLoss
from rl.optimizers import MuonAdamW
from rl.preflight import check_context
from rl.shard_index import LARGEST_BAD_SHARE, shard_index
from rl.start_policy import WEIGHTS_FILE, load_trained, prepare_policy
from rl.zero import WholeHead, zero_config

FEWEST_JUDGED = 1000
"""Samples after which the share of bad ones is judged; smaller data sets are judged as a whole."""


class Watch(Protocol):
    """What a run tells while it goes on."""

    def begin(self) -> None:
        """Everything that the run needs is there: it may leave files from now on."""

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of the steps since the last row."""

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """Samples that could not be read: `shard: key: reason`."""


class JointTrainer(Trainer):
    """`transformers.Trainer` on `JointLoss`: logs both losses apart, encodes pictures, counts bad
    samples, and writes checkpoints that hold the trained weights whole."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def __init__(
        self,
        *args: Any,
        make_optimizer: Callable[[], torch.optim.Optimizer],
        factor: Callable[[int], float],
        watch: Watch,
        encoder: BatchEncoder,
        samples: int,
        torn: int,
        checkpoints: Path,
        keep_last: int,
        ema: EmaCallback | None,
        **kwargs: Any,
    ) -> None:
        self._make_optimizer = make_optimizer
        self._factor = factor
        self._watch = watch
        self._encoder = encoder
        self._samples = samples
        self._torn = torn / max(torn + samples, 1)
        self._checkpoints = checkpoints
        self._keep_last = keep_last
        self._ema = ema
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self._skipped: list[str] = []
        self._bad: set[str] = set()  # an epoch later the same ones come again
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # the watch shows the numbers
        if ema is not None:
            self.add_callback(ema)

    # --- a step ------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        self._skipped += inputs.pop("skipped", ())
        return self._encoder(inputs) if "pixels" in inputs else inputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the weighted sum and add the parts up for the log."""
        outputs = model(**inputs)
        for name in PARTS:
            if name in outputs:
                self._sums[name] = self._sums.get(name, 0) + outputs[name]
        self._passes += 1
        loss: Tensor = outputs["loss"]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add both losses, each the mean over steps and processes since the last row."""
        for name, total in self._sums.items():
            mean = self.accelerator.reduce(total.float() / self._passes, "mean")
            logs[name] = float(mean)
        self._sums.clear()
        self._passes = 0
        skipped = gather_object(self._skipped)
        self._skipped = []
        if skipped:
            self._bad.update(skipped)
            logs["skipped"] = len(self._bad)
        [cut] = self.accelerator.reduce(
            torch.tensor([self._encoder.cut], device=self.args.device), "sum"
        )
        if cut:
            logs["captions_cut"] = int(cut)
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            if skipped:
                self._watch.skipped(self.state.global_step, skipped)
            self._watch.row(self.state.global_step, logs)
        self._judge()

    def _judge(self) -> None:
        """Stop when more samples are bad, those torn in the shards included, than one in 100."""
        steps = self.state.global_step - self._initial_global_step
        seen = steps * self.args.train_batch_size * self.args.gradient_accumulation_steps
        seen = min(seen * self.args.world_size, self._samples)
        judged = max(seen, min(FEWEST_JUDGED, self._samples))
        unreadable = len(self._bad) / judged
        if self._bad and self._torn + (1 - self._torn) * unreadable > LARGEST_BAD_SHARE:
            torn = f", {self._torn:.1%} of all are not whole: together" if self._torn else ","
            raise DataError(
                f"{len(self._bad)} of the {seen} samples read so far are bad{torn} more than "
                f"{LARGEST_BAD_SHARE:.0%}; metrics.jsonl names each.\n"
                "    Fix: pack the shards anew without them and start a new run; this one can be "
                "resumed on the same shards alone."
            )

    # --- optimizer ---------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the recipe's optimizer; DeepSpeed has it made anew."""
        if self.optimizer is None:
            self.optimizer = self._make_optimizer()
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the recipe's schedule on the optimizer, as DeepSpeed may have wrapped it."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(), self._factor
            )
        return self.lr_scheduler

    # --- checkpoints -------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the trained weights; the frozen ones are in the policy that the run began with."""
        assert output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        joint = self.accelerator.unwrap_model(self.model)
        state = joint.state_dict() if state_dict is None else state_dict
        trained = [name for name, p in joint.named_parameters() if p.requires_grad]
        save_file({n: state[n].cpu().contiguous() for n in trained}, folder / WEIGHTS_FILE)
        if self._ema is not None:
            self._ema.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a staging folder and publish it whole."""
        with published(self, self._checkpoints, self._keep_last):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        load_trained(self.accelerator.unwrap_model(self.model), weights)


def pretrain(
    recipe: PretrainRecipe,
    run_dir: Path,
    watch: Watch,
    progress: Progress,
    checkpoint: Path | None = None,
) -> None:
    """Train the recipe's parts; the last checkpoint in `run_dir/checkpoints` holds them.

    Started by torchrun, all its processes work on one run. Raises Interrupted after SIGINT or
    SIGTERM, with a checkpoint written.
    """
    policy, _ = prepare_policy(recipe)
    loss, train = recipe.loss, recipe.train
    joint = JointLoss(
        policy,
        cross_entropy=loss.cross_entropy,
        flow_matching=loss.flow_matching,
        condition_dropout=loss.condition_dropout,
        hidden_noise=loss.hidden_noise,
        bf16=train.bf16,
    )
    if train.gradient_checkpointing:
        policy.ar.gradient_checkpointing_enable({"use_reentrant": False})
        policy.diffusion.enable_gradient_checkpointing()
    if train.compile:
        policy.ar.model.compile(dynamic=True)
    arguments = training_arguments(recipe, run_dir, policy.device)
    use_one_gpu(arguments, progress)
    collator = Collator(policy)
    encoder = BatchEncoder(policy, collator, _context(recipe, policy), bool(loss.flow_matching))
    with PartialState().main_process_first():
        corpus, samples, faults = _corpus(recipe, policy, run_dir, progress)
    watch.begin()
    if faults and checkpoint is None and arguments.process_index == 0:
        watch.skipped(0, faults)
    named = [(name, p) for name, p in joint.named_parameters() if p.requires_grad]

    def make_optimizer() -> torch.optim.Optimizer:
        rate, decay = train.learning_rate, train.weight_decay
        if train.optimizer == "muon":
            return MuonAdamW(named, rate, decay)
        return torch.optim.AdamW([p for _, p in named], lr=rate, weight_decay=decay)

    ema = EmaCallback(named, train.ema) if train.ema else None
    if ema is not None and checkpoint is not None:
        ema.load(checkpoint)
    interrupt = InterruptCallback(progress)
    callbacks: list[TrainerCallback] = [interrupt]
    if train.deepspeed == "zero3":
        callbacks.append(WholeHead())
    trainer = JointTrainer(
        model=joint,
        args=arguments,
        train_dataset=corpus,
        data_collator=collator,
        callbacks=callbacks,
        make_optimizer=make_optimizer,
        factor=lambda step: trapezoid(step, train.steps, train.warmup_steps, train.decay_steps),
        watch=watch,
        encoder=encoder,
        samples=samples,
        torn=len(faults),
        checkpoints=run_dir / "checkpoints",
        keep_last=recipe.save.keep_last,
        ema=ema,
    )
    try:
        with repeatable_sums(policy.device):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interrupt.give_back()
        # Or transformers would load the next policy in pieces, too.
        unset_hf_deepspeed_config()
    step = trainer.state.global_step
    if interrupt.interrupted and step < train.steps:
        raise Interrupted(f"stopped after step {step}; go on with `atelier resume {run_dir}`")


def training_arguments(
    recipe: PretrainRecipe, run_dir: Path, device: torch.device
) -> TrainingArguments:
    """Return the recipe in the trainer's option names; RunError if a batch cannot be divided."""
    train = recipe.train
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        seed=recipe.seed % 2**32,
        max_steps=train.steps,
        max_grad_norm=train.grad_clip or 0.0,
        use_cpu=device.type == "cpu",
        bf16=train.bf16,
        deepspeed=zero_config(train.deepspeed),
        # The order is the corpus's own; see rl/corpus.py.
        train_sampling_strategy="sequential",
        dataloader_num_workers=recipe.data.workers,
        logging_steps=min(recipe.log.every, train.steps),
        save_strategy="steps",
        save_steps=recipe.save.every,
        report_to=list(recipe.log.trackers),
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    processes = arguments.world_size
    micro_batch = train.micro_batch or train.batch_size // processes
    if micro_batch == 0 or train.batch_size % (processes * micro_batch):
        raise RunError(
            f"train.batch_size {train.batch_size} cannot be divided among {processes} processes"
            f" in passes of {micro_batch}.\n"
            "    Fix: make it a multiple of processes times train.micro_batch."
        )
    arguments.per_device_train_batch_size = micro_batch
    arguments.gradient_accumulation_steps = train.batch_size // (processes * micro_batch)
    return arguments


def _context(recipe: PretrainRecipe, policy: Policy) -> int:
    """Return the longest sequence; RecipeError if not even an empty caption fits."""
    longest = int(policy.ar.config.max_position_embeddings)
    context = min(recipe.data.context or longest, longest)
    tokens = policy.config.num_tokens
    codes = torch.zeros(1, recipe.data.references, tokens, dtype=torch.int64)
    [empty] = policy.prompt_ids([""], codes if recipe.data.references else None)
    check_context(context, len(empty) + tokens)
    return context


def _corpus(
    recipe: PretrainRecipe, policy: Policy, run_dir: Path, progress: Progress
) -> tuple[Dataset[Row], int, Sequence[str]]:
    """Return what the run reads, how many samples there are in all, and what the shards lack."""
    data, seed = recipe.data, recipe.seed
    length = recipe.train.steps * recipe.train.batch_size
    if data.source != "scenes":
        index = shard_index(data.source, bool(data.references), run_dir, progress)
        whole = "squashed_tokens" in policy.config.compatibility
        shards = Shards(
            index,
            policy.config.image_size,
            seed,
            squashed_side=policy.config.tokenizer_image_size if whole else None,
        )
        return PictureCorpus(shards, seed=seed, length=length), len(index.rows), index.faults
    if data.references:
        return PictureCorpus(SceneEdits(seed), seed=seed, length=length), length, ()
    scenes = SceneCorpus(
        policy,
        task_weights(data.tasks),
        seed=seed,
        length=length,
        caption_noise=data.caption_noise,
        with_latents=bool(recipe.loss.flow_matching),
        seeded=recipe.loss.draws == "per_sample",
    )
    return scenes, length, ()


def task_weights(tasks: Mapping[Any, float] | None) -> dict[str, float]:
    """Return the recipe's task weights; all tasks alike where it names none."""
    return {str(task): weight for task, weight in (tasks or dict.fromkeys(TASKS, 1.0)).items()}


def trapezoid(step: int, steps: int, warmup: int, decay: int) -> float:
    """Return the learning-rate factor: a ramp up, a plateau, a ramp down to 2 %."""
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    down = min(1.0, max(0.02, (steps - step) / decay)) if decay else 1.0
    return up * down
