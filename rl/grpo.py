"""GRPO on image tokens: a thin subclass of TRL's trainer.

TRL keeps the loop, the options, the advantages and the loss. What images change is here: rollouts
that also render (`rollout_func`), log-probs over the image rows alone, groups without variance
left out of the update, and weight sync to an engine of ours.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from common.errors import RunError
from common.seeds import counter_seed
from rewards.runner import RewardRunner, Scored
from rl.checkpoints import published
from rl.decode_check import DecodeCheck
from rl.image_head import add_image_head
from rl.replay import load_rollout, save_rollout
from rl.reward_columns import reward_columns
from rl.rollouts import Rollout, Sampler
from rl.stages import Score
from rl.trl_release import GRPOConfig, GRPOTrainer
from rollout.ahead import AheadEngine, Request
from rollout.timeline import Timeline, busy_seconds
from rollout.weights import check_finite

Sync = Callable[[int], None]

UNSCORED_STEPS = 3
"""Steps in a row without a single scored picture after which a run stops."""


class ImageGRPOTrainer(GRPOTrainer):
    """GRPO whose completions are pictures.

    `sampler` makes the rollouts, `rewards` judges them (elsewhere: through `score`), `sync`
    brings the weights of a step to the engine and proves that they arrived. Rollouts are also
    written to the folder `save_to`, or read from `replay` instead of being made. `last_rollout`,
    `last_prompts` and `last_scores` stay readable for callbacks, and `all_scores`, which has those
    of the other processes too; `policy_lag` is the number of updates between the weights that drew
    them and those of the step, None where nothing is ever drawn ahead.
    """

    def __init__(
        self,
        model: nn.Module,
        args: GRPOConfig,
        records: Sequence[Mapping[str, Any]],
        *,
        sampler: Sampler,
        rewards: RewardRunner,
        score: Score | None = None,
        sync: Sync,
        drop_zero_variance: bool = True,
        decode_check: DecodeCheck | None = None,
        save_to: Path | None = None,
        replay: Path | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        peft_config: Any = None,
        checkpoints: Path,
        keep_last: int = 2,
    ) -> None:
        self.sampler = sampler
        self.rewards = rewards
        self.score = score
        self.records = records
        self.drop_zero_variance = drop_zero_variance
        self.decode_check = decode_check
        self.save_to = save_to
        self.replay = replay
        self.ahead = sampler.engine if isinstance(sampler.engine, AheadEngine) else None
        self.checkpoints = checkpoints
        self.keep_last = keep_last
        self.timeline = Timeline()
        self.last_rollout: Rollout | None = None
        self.last_scores: list[Scored] = []
        self.all_scores: list[Scored] = []
        self.last_prompts: list[str] = []
        self.policy_lag: int | None = None
        self._asked: list[Mapping[str, Any]] = []  # the records of the step's samples
        self._old_logprobs: Tensor | None = None
        self._nothing_to_learn = False
        self._unscored_steps = 0
        policy = sampler.policy
        with warnings.catch_warnings():
            # It may change, and the contract test tells.
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model=model,
                reward_funcs=reward_columns(self.reward, rewards.names),
                args=args,
                # Only places travel through the data set: Arrow would force one type on each column
                # of the records.
                train_dataset=Dataset.from_list(
                    [{"prompt": record["prompt"], "place": i} for i, record in enumerate(records)]
                ),
                processing_class=policy.tokenizer,
                callbacks=list(callbacks),
                peft_config=peft_config,
                rollout_func=_rollout,
            )
        self.remove_callback(PrinterCallback)  # the journal's callback shows the numbers
        config = policy.config
        for scored in (policy.ar, self.ref_model):
            if scored is not None:
                add_image_head(
                    self.accelerator.unwrap_model(scored),
                    config.image_start_id,
                    config.num_image_tokens,
                    sampler.sampling.temperature,
                )
        # TRL syncs weights and corrects importance only for its own vLLM client; ours stands in.
        self.use_vllm = True
        self.vllm_generation = _EngineSync(self, sync)
        self._last_loaded_step = -1

    # --- rollout and reward ---------------------------------------------------------------------

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage of the step's rollout was at work."""
        return busy_seconds(self.timeline.intervals)

    def rollout(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Sample, render and judge this process's groups (TRL's `rollout_func` contract)."""
        size = self.num_generations
        groups = [prompts[i] for i in range(0, len(prompts), size)]
        if len(prompts) % size or any(p != groups[i // size] for i, p in enumerate(prompts)):
            raise RunError(
                f"A process got {len(prompts)} samples that are not whole groups of {size}. "
                "Make rollout.prompts_per_step a multiple of the number of processes."
            )
        step, process = self.state.global_step, self.accelerator.process_index
        self.last_prompts = list(prompts)
        if self.replay is not None:
            rollout, self.policy_lag = load_rollout(
                self.replay, prompts, self.rewards.composition,
                step, process, self.accelerator.device,
            )  # fmt: skip
        else:
            rollout = self.sampler(groups, size, step, process, judge=self._judge)
        if self.ahead is not None:
            self.policy_lag = step - self.ahead.sampled_from
        if self.save_to is not None:
            with self.timeline.busy("save"):
                save_rollout(
                    self.save_to, rollout, prompts, self.sampler.sampling,
                    step, process, self.policy_lag,
                )  # fmt: skip
        self.last_rollout, self.last_scores = rollout, rollout.scores
        # Without the correction TRL does not ask for them: an update a step has ratio 1.
        self._old_logprobs = rollout.logprobs if self.vllm_importance_sampling_correction else None
        self.timeline.intervals += rollout.intervals
        if self.decode_check is not None and self.decode_check.due(step, self.sampler.decode):
            with self.timeline.busy("decode check"):
                self.decode_check(
                    self.sampler, rollout, size, step, process,
                    judge=self._judge, gather=self.accelerator.gather,
                )  # fmt: skip
        if self.ahead is not None:
            self.ahead.draw_ahead(self._requests(step + 1, len(groups)))
        return {
            "prompt_ids": rollout.prompt_ids,
            "completion_ids": rollout.completion_ids.tolist(),
            "logprobs": rollout.behaviour_logprobs.tolist(),
        }

    def _requests(self, step: int, groups: int) -> list[Request]:
        """Return what the engine is asked at `step`; none after the last one."""
        if step >= self.state.max_steps:
            return []
        records = self.records[step * groups : (step + 1) * groups]
        prompts = [str(record["prompt"]) for record in records]
        process = self.accelerator.process_index
        return self.sampler.requests(prompts, self.num_generations, step, process)

    def _judge(self, images: list[Any], rows: slice) -> list[Scored]:
        """Score pictures of the step's samples `rows` with every reward of the recipe."""
        keys = dict.fromkeys(key for record in self._asked for key in record if key != "prompt")
        columns = {key: [record.get(key) for record in self._asked[rows]] for key in keys}
        score = self.score or self.rewards.score
        return score(images, self.last_prompts[rows], columns, self.state.global_step)

    def reward(self, log_metric: Any, **_: Any) -> list[dict[str, float] | None]:
        """Return the scores of the rollout just made; None where a reward that counts failed.

        A picture's entry holds what each reward counts, which TRL multiplies with its weight.
        """
        self.all_scores = gather_object(self.last_scores)
        self._gather_events()
        weights = self.rewards.weights(self.state.global_step)
        self.reward_weights = torch.tensor([weights[name] for name in self.rewards.names])
        for name in self.rewards.names:
            parts = [p for s in self.last_scores if (p := s.parts[name]) is not None]
            if parts:
                log_metric(f"parts/{name}", float(np.mean(parts)))
        missing = sum(scored.total is None for scored in self.all_scores)
        log_metric("missing_rewards", float(missing))
        nothing = missing == len(self.all_scores)
        self._unscored_steps = self._unscored_steps + 1 if nothing else 0
        if self._unscored_steps == UNSCORED_STEPS:
            name, reason = next(iter(self.all_scores[0].reasons.items()), ("-", "unknown"))
            raise RunError(
                f"no picture of the last {UNSCORED_STEPS} steps could be scored (reward "
                f"`{name}`: {reason}).\n"
                "    Fix: mend the reward, then go on from the last checkpoint with "
                "`atelier resume`."
            )
        return [scored.counted for scored in self.last_scores]

    def _gather_events(self) -> None:
        """Give the first process, which writes the journal, what happened in the others."""
        if self.accelerator.num_processes == 1:
            return
        events, process = self.sampler.events, self.accelerator.process_index
        gathered = gather_object([event | {"process": process} for event in events])
        events[:] = gathered if self.accelerator.is_main_process else []

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return TRL's optimizer, which leaves all as it is in a step that teaches nothing.

        Its gradient is zero, and on a zero gradient AdamW would still follow its momentum. Said to
        the optimizer itself, because DeepSpeed keeps gradients of its own.
        """

        def forget(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if self._nothing_to_learn:
                optimizer.zero_grad(set_to_none=True)

        optimizer = super().create_optimizer(model)
        optimizer.register_step_pre_hook(forget)
        return optimizer

    # --- private methods of TRL that the image case replaces (pinned by a contract test) ---------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.timeline = Timeline()
        self._asked = [self.records[row["place"]] for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            output = self._informative(output)
        # The order of micro-batches is drawn next, from the global generator.
        torch.manual_seed(counter_seed(self.args.seed, "shuffle", self.state.global_step))
        return output

    def _informative(self, output: dict[str, Any]) -> dict[str, Any]:
        """Keep the groups whose rewards differ, filled up to whole micro-batches.

        They are found by their rewards: of equal ones the mean can be off by a rounding error,
        which the division by a standard deviation of about zero would make an advantage.
        """
        size = self.num_generations
        # What TRL's aggregation sees: the sum, or the rewards one by one.
        summed = self.multi_objective_aggregation == "sum_then_normalize"
        signals = [
            scored.total if summed or scored.counted is None else (*scored.counted.items(),)
            for scored in self.last_scores
        ]
        differ = [
            len({signal for signal in signals[i : i + size] if signal is not None}) > 1
            for i in range(0, len(signals), size)
        ]
        advantages = output["advantages"]
        informative = torch.tensor(differ, device=advantages.device).repeat_interleave(size)
        advantages = advantages * informative
        alike = torch.tensor([float(differ.count(False))], device=advantages.device)
        count_alike = float(self.accelerator.gather(alike).sum())
        self._metrics["train"]["zero_variance_groups"].append(count_alike)
        anywhere = bool(self.accelerator.gather(informative.any()[None]).any())
        self._nothing_to_learn = not anywhere and (self.drop_zero_variance or self.beta == 0)
        if not self.drop_zero_variance:
            return output | {"advantages": advantages}
        pieces = self.args.steps_per_generation
        order = torch.argsort(informative.int(), descending=True, stable=True)
        # As many rows on every process, since TRL gathers what it measures of each.
        counts = self.accelerator.gather(informative.sum()[None]).float()
        count = max(int(counts.max()), 1)
        rows = order[: -(-count // pieces) * pieces].sort().values
        # The loss is a mean over this process's rows and then over processes: those that only fill
        # up must not dilute it, and every informative row of every process counts the same.
        output = output | {"advantages": advantages * (len(rows) / max(float(counts.mean()), 1))}
        return {
            key: value[rows] if torch.is_tensor(value) and value.dim() else value
            for key, value in output.items()
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a staging folder and publish it whole."""
        with published(self, self.checkpoints, self.keep_last):
            super()._save_checkpoint(model, trial)
            if self.ahead is not None:
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                self.ahead.save(folder)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        if not torch.is_grad_enabled() and self._old_logprobs is not None:
            # The rollout's teacher-forced pass was this very pass.
            old, self._old_logprobs = self._old_logprobs, None
            return old, None, None
        size = batch_size or len(input_ids)
        logprobs, entropies = [], []
        for start in range(0, len(input_ids), size):
            with self.accelerator.autocast():
                output = model(
                    input_ids=input_ids[start : start + size],
                    attention_mask=attention_mask[start : start + size],
                    image_tokens=logits_to_keep,
                )
            logprobs.append(output.log_probs)
            entropies.append(output.entropy)
        return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None, None


class _EngineSync:
    """What TRL calls before a rollout when the weights have changed."""

    def __init__(self, trainer: ImageGRPOTrainer, sync: Sync) -> None:
        self._trainer = trainer
        self._sync = sync

    def sync_weights(self) -> None:
        if self._trainer.replay is not None:
            # Nobody samples; the held-out evaluation syncs by itself.
            check_finite(self._trainer.model, self._trainer.state.global_step)
            return
        with self._trainer.timeline.busy("sync"):
            self._sync(self._trainer.state.global_step)


def _rollout(prompts: list[str], trainer: ImageGRPOTrainer) -> dict[str, Any]:
    return trainer.rollout(prompts)
