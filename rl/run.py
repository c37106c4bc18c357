"""A GRPO run from its recipe: build the parts, train, leave a policy folder.

This file is the way in: read `_run` from top to bottom.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common.atomic import atomic_dir, write_text
from common.errors import Interrupted, RunError
from common.journal import Journal, read_journal
from common.lock import run_lock
from common.processes import is_main_process, process_count
from common.progress import Progress, SilentProgress
from data.prompts import records_of_run
from evals.alarms import MISMATCH_ROUNDED
from evals.policy_hash import policy_hash
from evals.results import held_out_row
from evals.suites import Suite, load_suite
from policy import Policy, policy_path
from policy.prompts import PromptEncoder
from policy.quiet import quiet_libraries
from policy.sampling import Sampling
from recipes import LoadedRecipe, dump_recipe, load_recipe
from recipes.locate import located
from recipes.schema_grpo import GrpoRecipe
from recipes.schema_rollout import DecodeEvalSection
from rl.callbacks import HeldOut, HeldOutCallback, InterruptCallback, JournalCallback
from rl.checkpoints import checkpoint_to_resume, refuse_other_processes, step_of
from rl.decode_check import DecodeCheck, decode_of_journal
from rl.devices import note_devices, repeatable_sums, training_device, use_one_gpu
from rl.grpo import ImageGRPOTrainer, Sync
from rl.lora import lora_config
from rl.preflight import (
    check_installed,
    check_launch,
    check_replay,
    check_replayed_rewards,
    check_save_to,
    check_tiles,
    check_whole_batch,
)
from rl.provenance import with_stage
from rl.rollouts import Sampler
from rl.stages import Journaled, adapter_rank, build_rewards, open_stages, placements
from rl.trl_release import GRPOConfig
from rl.zero import zero_config
from rollout.decode import Decode
from rollout.engine import Engine
from rollout.micro_batch import Events, memory_advice
from rollout.sync import PROBE_TOKENS, ModelSide, verify_sync
from rollout.weights import check_finite

PROBES = (
    "x",
    "a photo of a red circle",
    "a photo of a red circle left of a blue square and above a green triangle and two yellow "
    "circles right of a red square and below a photo of three blue triangles and a green circle",
    "two yellow squares below a green circle and a photo of a blue triangle right of three red "
    "squares and above a photo of a green triangle left of a red square and two yellow circles",
)
"""Prompts that prove each sync. Two begin with a block of vLLM's prefix cache (32 tokens) each: a
shorter prompt is never read from there. `probe_ids` cuts them to a small context."""
WHOLE_PROBES_EVERY = 25
"""Steps between two syncs whose probes are whole pictures: what only late tokens show."""
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest difference in nats of a probe token's log-prob; two bfloat16 passes differ by 0.1."""


def train(loaded: LoadedRecipe, run_dir: Path, progress: Progress | None = None) -> None:
    """Run a recipe from its start in a new folder; the trained policy is `run_dir/policy`.

    Raises `Interrupted` after SIGINT or SIGTERM, with a checkpoint written.
    """
    recipe = located(_grpo(loaded), loaded.files)
    check_save_to(recipe)
    _run(recipe, run_dir, progress or SilentProgress(), None, run_lock(run_dir))


def resume(run_dir: Path, progress: Progress | None = None) -> None:
    """Go on from the newest whole checkpoint to the same numbers an uninterrupted run gives."""
    progress = progress or SilentProgress()
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise RunError(f"{run_dir} is not a run: recipe.yaml is missing.")
    with run_lock(run_dir):
        recipe = _grpo(load_recipe(str(path)))
        checkpoint = checkpoint_to_resume(run_dir, progress)
        if checkpoint is not None:
            refuse_other_processes(checkpoint)
        _run(recipe, run_dir, progress, checkpoint, nullcontext())


def _run(
    recipe: GrpoRecipe,
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
    check_replay(recipe, process_count())
    check_processes(recipe, process_count())
    with quiet_libraries(), ExitStack() as parts:
        policy = load_policy(recipe)
        check_tiles(recipe, policy.config.latent_size, policy.vae.config)
        start = policy_hash(policy) if main else ""
        lora = lora_config(recipe.policy.lora, policy) if recipe.policy.lora else None
        records = records_of_run(recipe)
        rewards = parts.enter_context(build_rewards(recipe))
        rewards.check_records(records)
        check_replayed_rewards(recipe, rewards.names)
        check_whole_batch(recipe, rewards.whole_batch, process_count())
        suite = None
        if recipe.evals.every:
            suite = load_suite(recipe.evals.suite, recipe.evals.limit).from_prompts_alone()
            parts.callback(suite.close)
        asked = {str(r["prompt"]) for r in [*records, *(suite.records if suite else ())]}
        longest = max(map(len, policy.prompt_ids(sorted(asked)) + probe_ids(policy)))
        told = Journaled()
        stages = open_stages(recipe, policy, rewards, longest, told, parts)
        sync = _sync(policy, stages.engine, bool(adapter_rank(recipe)), probe_tolerance(recipe))
        rollout, decode = recipe.rollout, recipe.decode.train
        sampler = Sampler(
            policy,
            stages.engine,
            Sampling(rollout.temperature, rollout.top_k, rollout.top_p),
            decoding(recipe, decode, decode.noise == "shared_in_group"),
            recipe.seed,
            recipe.train.micro_batch,
            rollout.waves,
            told.events,
            stages.render,
        )
        # Only now: a run that cannot start leaves no folder behind.
        parts.enter_context(lock)
        done = 0 if checkpoint is None else step_of(checkpoint)
        interrupt = InterruptCallback(progress)
        parts.callback(interrupt.give_back)
        arguments = trainer_config(recipe, run_dir, policy.config.num_tokens)
        use_one_gpu(arguments, progress)
        # Or transformers would load the next policy for DeepSpeed, too.
        parts.callback(unset_hf_deepspeed_config)
        trainer = ImageGRPOTrainer(
            policy.ar,
            arguments,
            records,
            sampler=sampler,
            rewards=rewards,
            score=stages.score,
            sync=sync,
            drop_zero_variance=recipe.algorithm.drop_zero_variance,
            decode_check=_decode_check(recipe, told.events),
            save_to=Path(rollout.save_to) if rollout.save_to else None,
            replay=Path(rollout.replay) if rollout.replay else None,
            callbacks=[interrupt],
            peft_config=lora,
            checkpoints=run_dir / "checkpoints",
            keep_last=recipe.save.keep_last,
        )
        if main:
            write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
            journal = Journal(run_dir / "metrics.jsonl")
            journal.rewind(-1 if checkpoint is None else done)
            note_devices(journal, recipe, policy.device, done)
            sampler.decode = decode_of_journal(read_journal(journal.path), sampler.decode)
            shown = JournalCallback(journal, progress, told.events, told.busy)
            shown.trainer = trainer
            trainer.add_callback(shown)
            if suite:
                held_out = _held_out(recipe, suite, sampler, sync)
                every = recipe.evals.every
                trainer.add_callback(HeldOutCallback(every, held_out, journal, progress))
        if trainer.ahead is not None and checkpoint is not None:
            trainer.ahead.restore(checkpoint)
        progress.start("train", recipe.train.steps)
        progress.advance("train", done)
        # The stages of a rollout help themselves; what is left is the update.
        fix = f"set train.micro_batch lower in {run_dir}/recipe.yaml, then `atelier resume` it"
        with memory_advice("the update", fix), repeatable_sums(policy.device):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        progress.finish("train")
        step = trainer.state.global_step
        if interrupt.interrupted and step < recipe.train.steps:
            raise Interrupted(f"stopped after step {step}; go on with `atelier resume {run_dir}`")
        if main:
            _write_policy(trainer, policy, recipe, run_dir, start)


# --- the parts -----------------------------------------------------------------------------------


def check_processes(recipe: GrpoRecipe, processes: int) -> None:
    """Raise RunError unless so many training processes can share the run."""
    rollout = recipe.rollout
    if processes == 1:
        return
    if recipe.decode.check.every:
        raise RunError(
            f"decode.check.every: decoding is checked by one training process, and this run has "
            f"{processes}.\n    Fix: decode.check.every=0, or start one process."
        )
    if rollout.engine != "transformers":
        raise RunError(
            "rollout.engine: of several training processes each samples for itself, with "
            "transformers.\n    Fix: rollout.engine=transformers, or start one process."
        )
    for section, place in placements(recipe).items():
        raise RunError(
            f"{section}.workers: {place.workers} workers of one training process are not shared "
            f"with others, and this run has {processes}.\n"
            f"    Fix: {section}.workers=0, or start one process."
        )
    if rollout.prompts_per_step % processes:
        more = -(-rollout.prompts_per_step // processes) * processes
        raise RunError(
            f"rollout.prompts_per_step: {rollout.prompts_per_step} prompts cannot be divided among "
            f"{processes} processes.\n    Fix: rollout.prompts_per_step={more}"
        )
    images = rollout.group_size * rollout.prompts_per_step // processes
    if recipe.train.micro_batch and images % min(recipe.train.micro_batch, images):
        raise RunError(
            f"train.micro_batch: {recipe.train.micro_batch} does not divide the {images} images of "
            f"a process.\n    Fix: use a divisor of {images}."
        )


def load_policy(recipe: GrpoRecipe) -> Policy:
    """Load the policy that is trained; only its language model learns."""
    path = policy_path(recipe.policy.path)
    device = training_device(recipe.policy.device)
    policy = Policy.from_pretrained(path, getattr(torch, recipe.policy.dtype), device)
    policy.requires_grad_(False)
    policy.ar.requires_grad_(True)
    return policy


def trainer_config(recipe: GrpoRecipe, run_dir: Path, completion_length: int) -> GRPOConfig:
    """Return the recipe in TRL's option names."""
    images = recipe.rollout.group_size * recipe.rollout.prompts_per_step // process_count()
    micro_batch = min(recipe.train.micro_batch or images, images)
    pieces = images // micro_batch
    bf16_weights = recipe.policy.dtype == "bfloat16"
    algorithm = recipe.algorithm
    return GRPOConfig(
        output_dir=str(run_dir),
        seed=recipe.seed % 2**32,
        use_cpu=recipe.policy.device == "cpu" or not torch.cuda.is_available(),
        bf16=False,
        # Of the trainer's options the one that says what the weights are, without autocast.
        bf16_full_eval=bf16_weights and recipe.train.deepspeed is not None,
        deepspeed=zero_config(recipe.train.deepspeed, bf16_weights),
        ddp_find_unused_parameters=False,
        gradient_checkpointing=False,
        max_steps=recipe.train.steps,
        per_device_train_batch_size=micro_batch,
        steps_per_generation=pieces,
        gradient_accumulation_steps=pieces,
        num_generations=recipe.rollout.group_size,
        max_completion_length=completion_length,
        temperature=recipe.rollout.temperature,
        learning_rate=recipe.train.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=recipe.train.warmup_steps,
        weight_decay=recipe.train.weight_decay,
        max_grad_norm=recipe.train.grad_clip or 0.0,
        beta=algorithm.beta,
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        loss_type="grpo",
        scale_rewards=algorithm.advantage_scale,
        multi_objective_aggregation=recipe.rewards.multi_objective_aggregation,
        vllm_importance_sampling_correction=algorithm.importance_cap is not None,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=algorithm.importance_cap,
        shuffle_dataset=False,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=recipe.save.every,
        logging_steps=1,
        report_to=list(recipe.log.trackers),
        disable_tqdm=True,
    )


def probe_tolerance(recipe: GrpoRecipe) -> float:
    """Return by how many nats engine and trainer may differ on a probe token's log-prob."""
    if recipe.rollout.rounds_cache:
        return MISMATCH_ROUNDED
    return PROBE_TOLERANCE[recipe.policy.dtype]


def probe_ids(policy: Policy) -> list[list[int]]:
    """Return the tokens of `PROBES`, the last of each that the context holds beside the picture."""
    room = int(policy.ar.config.max_position_embeddings) - policy.config.num_tokens
    whole = PromptEncoder(policy.tokenizer).ids(policy.config, PROBES)
    return [ids[-room:] for ids in whole]


def _sync(policy: Policy, engine: Engine, adapter: bool, tolerance: float) -> Sync:
    config = policy.config
    probes = probe_ids(policy)
    images = (config.image_start_id, config.num_image_tokens)

    def sync(step: int) -> None:
        check_finite(policy.ar, step)
        side = ModelSide(policy.ar, step, probes, *images, adapter)
        length = PROBE_TOKENS if step % WHOLE_PROBES_EVERY else config.num_tokens
        verify_sync(engine, side, tolerance, length)

    return sync


def decoding(recipe: GrpoRecipe, section: DecodeEvalSection, shared_noise: bool = True) -> Decode:
    """Return a section of the recipe as the decode stage takes it."""
    interval, compiled = section.guidance_interval, recipe.decode.compile
    return Decode(section.steps, section.guidance, shared_noise, interval, compiled, section.tile)


def _decode_check(recipe: GrpoRecipe, events: Events) -> DecodeCheck | None:
    check = recipe.decode.check
    if not check.every:
        return None
    full = decoding(recipe, recipe.decode.eval)
    return DecodeCheck(check.every, check.limit, check.prompts, full, events)


def _held_out(recipe: GrpoRecipe, suite: Suite, sampler: Sampler, sync: Sync) -> HeldOut:
    """Return the held-out evaluation: the same prompts and seeds at every step of every run."""
    judge = Sampler(
        sampler.policy,
        sampler.engine,
        Sampling(),
        decoding(recipe, recipe.decode.eval, shared_noise=False),
        run_seed=0,
        micro_batch=recipe.train.micro_batch,
        events=sampler.events,
        render=sampler.render,
    )

    def held_out(step: int) -> dict[str, Any]:
        sync(step)  # the engine still holds the weights of the step's rollouts
        rollout = judge([str(record["prompt"]) for record in suite.records], 1, "held-out")
        scores = [
            suite.score(image, record)
            for image, record in zip(rollout.images, suite.records, strict=True)
        ]
        return held_out_row(suite, scores)

    return held_out


def _write_policy(
    trainer: ImageGRPOTrainer, policy: Policy, recipe: GrpoRecipe, run_dir: Path, start: str
) -> None:
    """Merge the adapter and write the policy folder in one rename."""
    check_finite(trainer.model, trainer.state.global_step)
    if recipe.policy.lora is not None:
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    del policy.ar.forward  # the trainer's extended forward pass
    policy.config = with_stage(policy.config, recipe, start)
    with atomic_dir(run_dir / "policy") as staged:
        policy.save_pretrained(staged)


def _grpo(loaded: LoadedRecipe) -> GrpoRecipe:
    assert isinstance(loaded.recipe, GrpoRecipe)
    return loaded.recipe
