"""The `grpo` recipe: reinforcement learning of the autoregressive model from image rewards."""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from recipes.schema_common import (
    Device,
    Dtype,
    Header,
    LogSection,
    LoraSection,
    OptimizerSection,
    SaveSection,
    SceneTask,
    Section,
    TextPath,
    cross_error,
)
from recipes.schema_rollout import DecodeSection, RolloutSection, WorkerSection

SCENE_TASKS: tuple[str, ...] = SceneTask.__args__  # type: ignore[attr-defined]


class PolicySection(Section):
    """The policy that is trained."""

    path: Annotated[
        TextPath,
        Field(description="`base` for the policy shipped with the package, or a policy folder."),
    ] = "base"
    dtype: Annotated[Dtype, Field(description="Number format of weights and activations.")] = (
        "float32"
    )
    device: Annotated[Device, Field(description="auto = cuda where there is a GPU, else cpu.")] = (
        "auto"
    )
    lora: Annotated[
        LoraSection | None,
        Field(description="Adapters to train; null = train all weights of the AR model."),
    ] = LoraSection()


class PromptsSection(Section):
    """What the policy is asked to draw."""

    source: Annotated[
        TextPath,
        Field(
            pattern=r"^scenes$|.\.jsonl$",
            description="`scenes` for the scene world, or a .jsonl file of prompt records.",
        ),
    ] = "scenes"
    split: Annotated[
        Literal["train", "tune"],
        Field(
            description="Part of the scene world's prompts; held_out is kept for evaluation. "
            "A file is used whole."
        ),
    ] = "train"
    tasks: Annotated[
        dict[str, Annotated[float, Field(ge=0)]] | None,
        Field(
            min_length=1,
            description="Task -> how often it is drawn, relative to the others (0 = never); "
            "null = GenEval's six tasks alike, or all records of the file.",
        ),
    ] = None

    @model_validator(mode="after")
    def _known_tasks(self) -> Self:
        if self.tasks is not None and not any(self.tasks.values()):
            raise cross_error("tasks", "Every task has weight 0.", "give one a weight above 0.")
        for task in self.tasks or () if self.source == "scenes" else ():
            if task not in SCENE_TASKS:
                raise cross_error(
                    f"tasks.{task}",
                    f"The scene world has no task `{task}`.",
                    f"use one of: {', '.join(SCENE_TASKS)}.",
                )
        return self


class GateSection(Section):
    """When a reward counts."""

    reward: Annotated[str, Field(min_length=1, description="Name of another reward of the list.")]
    at_least: Annotated[float, Field(description="Its smallest score at which this one counts.")]


class RewardFunction(Section):
    """One reward and its share."""

    use: Annotated[
        str,
        Field(min_length=1, description="Name of a reward (`atelier ls rewards`) or file.py:name."),
    ]
    name: Annotated[
        str | None, Field(min_length=1, description="Its name in logs and gates; null = its own.")
    ] = None
    weight: Annotated[
        float, Field(description="Factor on this reward in the sum; 0 = logged, not counted.")
    ] = 1.0
    schedule: Annotated[
        tuple[Annotated[tuple[int, float], Strict(False)], ...] | None,
        Strict(False),
        Field(
            min_length=1,
            description="Points [step, factor] of a factor on the weight, linear in between; "
            "null = 1 throughout.",
        ),
    ] = None
    range: Annotated[
        tuple[float, float] | None,
        Strict(False),
        Field(description="Scores that count as 0 and as 1; null = scores count as they are."),
    ] = None
    only_if: Annotated[
        GateSection | None,
        Field(description="Counts only where another reward is high enough, else as 0."),
    ] = None
    args: Annotated[
        dict[str, Any], Field(description="Arguments passed to the reward by name.")
    ] = Field(default_factory=dict)
    timeout_s: Annotated[
        float, Field(gt=0, description="Seconds for one batch; later scores count as missing.")
    ] = 60.0
    workers: Annotated[
        int, Field(ge=0, le=256, description="Processes of its own; 0 = a thread of the run.")
    ] = 0

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        steps = [step for step, _ in self.schedule or ()]
        if any(later <= step for step, later in pairwise(steps)):
            raise cross_error("schedule", "The steps do not rise.", "put the points in order.")
        if self.range is not None and self.range[0] == self.range[1]:
            raise cross_error("range", "Both ends are the same score.", "write [low, high].")
        return self


class RewardsSection(Section):
    """What is good."""

    functions: Annotated[
        tuple[RewardFunction, ...],
        Strict(False),
        Field(min_length=1, description="Rewards; an image's reward is their weighted sum."),
    ]
    multi_objective_aggregation: Annotated[
        Literal["sum_then_normalize", "normalize_then_sum"],
        Field(
            description="TRL's option: advantages from the weighted sum, or each reward normalised "
            "within its group before the sum (GDPO)."
        ),
    ] = "sum_then_normalize"
    cache: Annotated[
        bool, Field(description="Score equal images of equal prompts once, within a run.")
    ] = False
    workers: Annotated[
        int,
        Field(
            ge=0,
            le=4096,
            description="Copies of all these rewards in processes of their own, placed by Ray; 0 = "
            "in the trainer's process.",
        ),
    ] = 0
    ray: WorkerSection = WorkerSection()

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if not any(function.weight for function in self.functions):
            raise cross_error(
                "functions.0.weight", "A weight of 0 has no effect.", "give one reward a weight."
            )
        return self


class AlgorithmSection(Section):
    """The GRPO loss."""

    beta: Annotated[
        float, Field(ge=0, le=10, description="Weight of the KL term against the start policy.")
    ] = 0.0
    clip_low: Annotated[
        float, Field(gt=0, lt=1, description="Ratios are clipped below 1 - clip_low.")
    ] = 0.2
    clip_high: Annotated[
        float, Field(gt=0, le=10, description="Ratios are clipped above 1 + clip_high.")
    ] = 0.2
    advantage_scale: Annotated[
        Literal["group", "none"],
        Field(description="Divide by the group's standard deviation, or not."),
    ] = "group"
    drop_zero_variance: Annotated[
        bool, Field(description="Leave out groups whose images all have the same reward.")
    ] = True
    importance_cap: Annotated[
        float | None,
        Field(
            ge=1,
            description="Largest per-token ratio between trainer and engine; null = no correction.",
        ),
    ] = 2.0


class TrainSection(OptimizerSection):
    """The optimizer, one update a step."""

    micro_batch: Annotated[
        int | None,
        Field(
            ge=1,
            description="Images per backward pass of a process; null = its share of a step at "
            "once.",
        ),
    ] = None
    deepspeed: Annotated[
        Literal["zero1", "zero2", "zero3"] | None,
        Field(
            description="Divide among processes the optimizer state (zero1), also gradients "
            "(zero2); null = every process has all of it. zero3 is for pretraining alone."
        ),
    ] = None

    @model_validator(mode="after")
    def _samples_from_whole_weights(self) -> Self:
        if self.deepspeed == "zero3":
            raise cross_error(
                "deepspeed",
                "GRPO samples from the weights that it trains, and zero3 cuts them into pieces.",
                "use zero2.",
            )
        return self


class EvalsSection(Section):
    """Evaluation on held-out prompts during training."""

    every: Annotated[int, Field(ge=0, description="Steps between two evaluations; 0 = none.")] = 10
    suite: Annotated[
        str, Field(min_length=1, description="Benchmark suite (`atelier ls suites`).")
    ] = "geneval-scenes"
    limit: Annotated[
        int | None, Field(ge=1, description="Prompts per evaluation; null = the whole suite.")
    ] = 60


class GrpoRecipe(Header):
    """Group relative policy optimization (GRPO) from image rewards."""

    kind: Annotated[Literal["grpo"], Field(description="What this recipe does.")]
    policy: Annotated[PolicySection, Field(description="Policy that is trained.")] = PolicySection()
    prompts: Annotated[PromptsSection, Field(description="Prompts it is trained on.")] = (
        PromptsSection()
    )
    rollout: Annotated[RolloutSection, Field(description="Sampling of image tokens.")] = (
        RolloutSection()
    )
    decode: Annotated[DecodeSection, Field(description="Tokens to pixels.")] = DecodeSection()
    rewards: Annotated[RewardsSection, Field(description="What is good.")]
    algorithm: Annotated[AlgorithmSection, Field(description="The loss.")] = AlgorithmSection()
    train: Annotated[TrainSection, Field(description="The optimizer.")]
    evals: Annotated[EvalsSection, Field(description="Held-out evaluation.")] = EvalsSection()
    save: Annotated[SaveSection, Field(description="Checkpoints.")] = SaveSection()
    log: Annotated[LogSection, Field(description="Trackers.")] = LogSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        images = self.rollout.group_size * self.rollout.prompts_per_step
        if self.train.micro_batch and images % self.train.micro_batch:
            raise cross_error(
                "train.micro_batch",
                f"A step has {images} images (group_size x prompts_per_step), which "
                f"{self.train.micro_batch} does not divide.",
                f"use a divisor of {images}.",
            )
        each = self.rewards.multi_objective_aggregation == "normalize_then_sum"
        if each and self.algorithm.advantage_scale == "none":
            raise cross_error(
                "algorithm.advantage_scale",
                "With normalize_then_sum each reward is divided by its own standard deviation.",
                "use group, or rewards.multi_objective_aggregation sum_then_normalize.",
            )
        if self.rollout.max_policy_lag and not self.rollout.workers:
            raise cross_error(
                "rollout.max_policy_lag",
                "An engine in the trainer's process cannot sample during the update.",
                "set rollout.workers, or this to 0.",
            )
        if self.rollout.max_policy_lag and self.algorithm.importance_cap is None:
            raise cross_error(
                "rollout.max_policy_lag",
                "Samples of older weights need the per-token correction.",
                "set algorithm.importance_cap, such as 2.0, or this to 0.",
            )
        if self.rollout.rounds_cache and self.algorithm.importance_cap is None:
            raise cross_error(
                "rollout.vllm.cache_dtype",
                "With a cache in 8 bits vLLM samples from a law a little beside the trainer's.",
                "set algorithm.importance_cap, such as 2.0, or this to auto.",
            )
        busy = self.rollout.waves > 1 or self.rollout.max_policy_lag
        if self.rollout.engine == "vllm" and self.rollout.vllm.sleep and busy:
            raise cross_error(
                "rollout.vllm.sleep",
                "With waves or a policy lag vLLM samples while others need its memory.",
                "set rollout.waves to 1 and rollout.max_policy_lag to 0, or this to false.",
            )
        lora = self.policy.lora
        if self.rollout.lora_sync == "adapter" and (
            self.rollout.engine != "vllm" or lora is None or lora.rank > 512
        ):
            raise cross_error(
                "rollout.lora_sync",
                "Adapters by themselves are for vLLM, which takes ranks up to 512.",
                "set this to merged, or rollout.engine to vllm and policy.lora.",
            )
        if self.rollout.save_to and self.rollout.replay:
            raise cross_error(
                "rollout.save_to", "A replay makes no rollouts to save.", "set one of the two."
            )
        if self.rollout.replay and self.decode.check.every:
            raise cross_error(
                "decode.check.every", "A replay decodes nothing to check.", "set it to 0."
            )
        if self.decode.check.every and self.rollout.group_size < 3:
            raise cross_error(
                "decode.check.every",
                f"Groups of {self.rollout.group_size} have no order to compare; it takes 3.",
                "raise rollout.group_size, or set this to 0.",
            )
        if self.rollout.waves > self.rollout.prompts_per_step:
            raise cross_error(
                "rollout.waves",
                f"A step has {self.rollout.prompts_per_step} prompts, fewer than waves.",
                f"use at most {self.rollout.prompts_per_step}.",
            )
        return self
