"""The stages of a rollout where the recipe wants them: in this process, or in workers on Ray."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import RunError
from policy import Policy, policy_path
from recipes.schema_grpo import GrpoRecipe
from recipes.schema_rollout import WorkerSection
from rewards.cache import ScoreCache
from rewards.runner import RewardRunner, Scored
from rewards.spec import RewardSpec, spec_from
from rollout.actors import ActorPool
from rollout.ahead import AheadEngine
from rollout.build import EngineSpec
from rollout.cluster import Placement, ray_cluster
from rollout.decode import Decoder, Render
from rollout.decode_pool import DecodePool, Head
from rollout.engine import Engine
from rollout.micro_batch import Events
from rollout.ray_pool import RayPool
from rollout.reward_pool import RewardPool
from rollout.timeline import Interval
from rollout.transformers_engine import TransformersEngine

Score = Callable[..., list[Scored]]
"""`RewardRunner.score`, wherever it happens."""


@dataclass
class Journaled:
    """What the parts of a run tell its journal, which takes it out after each step."""

    events: Events = field(default_factory=list)
    busy: list[Interval] = field(default_factory=list)
    """When each worker was at work."""


@dataclass(frozen=True)
class Stages:
    """Sampling, rendering and judging."""

    engine: Engine
    render: Render
    score: Score


def open_stages(
    recipe: GrpoRecipe,
    policy: Policy,
    rewards: RewardRunner,
    longest_prompt: int,
    told: Journaled,
    parts: ExitStack,
) -> Stages:
    """Build the three stages, which `parts` closes.

    `longest_prompt` is that of the whole run in tokens, template included.
    """
    places = placements(recipe, bool(rewards.whole_batch))
    if places:
        address = recipe.rollout.ray.address
        parts.enter_context(ray_cluster(address, list(places.values())))
    pools: list[ActorPool] = []  # all of them start at the same time
    render: Render = Decoder(policy, recipe.train.micro_batch, told.events)
    if place := places.get("decode"):
        head = Head(str(policy_path(recipe.policy.path)), recipe.policy.dtype, _device(place))
        render = DecodePool(head, place, recipe.train.micro_batch, told.events, told.busy)
        pools.append(render.actors)
    score: Score = rewards.score
    if place := places.get("rewards"):
        judges = RewardPool(
            reward_specs(recipe),
            place,
            recipe.rewards.cache,
            bool(rewards.whole_batch),
            told.events,
            told.busy,
            prompt_folder(recipe),
        )
        score = judges.score
        pools.append(judges.actors)
    for pool in pools:
        parts.callback(pool.close)
    engine = build_engine(recipe, policy, longest_prompt, places.get("rollout"), told)
    if isinstance(engine, RayPool):
        pools.append(engine.actors)
        if recipe.rollout.max_policy_lag:
            engine = AheadEngine(engine)
    parts.callback(engine.close)  # first of all: it may be drawing ahead
    for pool in pools:
        pool.await_ready()
    return Stages(engine, render, score)


def placements(recipe: GrpoRecipe, whole_batch: bool = False) -> dict[str, Placement]:
    """Return where the workers of each section run that has any; a replay has no use for them.

    With `whole_batch` one reward worker gets all pictures of a step.
    """
    sections: dict[str, tuple[int, WorkerSection]] = {
        "rollout": (recipe.rollout.workers, recipe.rollout.ray),
        "decode": (recipe.decode.workers, recipe.decode.ray),
        "rewards": (recipe.rewards.workers, recipe.rewards.ray),
    }
    places = {
        section: Placement(
            section, count, ray.cpus_per_worker, ray.gpus_per_worker, ray.resource, ray.timeout_s
        )
        for section, (count, ray) in sections.items()
        if count and not recipe.rollout.replay
    }
    if rewards := places.get("rewards"):
        # A reward that hangs is its runner's matter. In batches and singly it may use up its limit
        # for every picture of a share, and for a few calls besides (`rewards.runner`).
        images = recipe.rollout.prompts_per_step * recipe.rollout.group_size
        calls = 16 + math.ceil(images / (1 if whole_batch else rewards.workers))
        slowest = max(function.timeout_s for function in recipe.rewards.functions)
        limit = rewards.timeout_s + calls * slowest
        places["rewards"] = replace(rewards, timeout_s=limit)
    return places


def build_engine(
    recipe: GrpoRecipe,
    policy: Policy,
    longest_prompt: int,
    place: Placement | None,
    told: Journaled,
) -> Engine:
    """Return the rollout engine: the trainer's own module, vLLM beside it, or workers on Ray."""
    config, rollout = policy.config, recipe.rollout
    images = (config.image_start_id, config.num_image_tokens, config.num_tokens)
    # A replay samples for the held-out evaluation alone.
    if (rollout.engine == "transformers" and place is None) or rollout.replay:
        return TransformersEngine(policy.ar, *images, config.pad_id, events=told.events)
    if rollout.transfer and policy.ar.device.type != "cuda":
        raise RunError(
            f"rollout.vllm.weight_transfer: {rollout.transfer} sends from GPU to GPU, and the "
            "trainer runs on the CPU.\n    Fix: rollout.vllm.weight_transfer=ray"
        )
    spec = EngineSpec(
        rollout.engine,
        str(policy_path(recipe.policy.path) / "ar"),
        *images,
        config.pad_id,
        recipe.policy.dtype,
        longest_prompt,
        "cpu" if place is None else _device(place),
        adapter_rank(recipe),
        rollout.vllm.cache_gib,
        rollout.vllm.compile,
        rollout.vllm.cache_dtype,
        rollout.vllm.sleep,
        rollout.transfer,
    )
    if place is None:
        return spec.build(told.events)
    return RayPool(spec.build, place, policy.ar.dtype, told.events, told.busy, rollout.transfer)


def adapter_rank(recipe: GrpoRecipe) -> int | None:
    """Return the rank of the adapters that travel to the engine alone; None: they do not."""
    alone = recipe.rollout.lora_sync == "adapter" and not recipe.rollout.replay
    return recipe.policy.lora.rank if recipe.policy.lora and alone else None


def build_rewards(recipe: GrpoRecipe) -> RewardRunner:
    """Load the rewards of a recipe whose files have been located."""
    cache = ScoreCache() if recipe.rewards.cache else None
    return RewardRunner(reward_specs(recipe), folder=prompt_folder(recipe), cache=cache)


def prompt_folder(recipe: GrpoRecipe) -> Path:
    """Return where relative paths of prompt records start."""
    return Path(recipe.prompts.source).parent


def reward_specs(recipe: GrpoRecipe) -> list[RewardSpec]:
    """Return the recipe's rewards as the runner takes them."""
    return [spec_from(function.model_dump()) for function in recipe.rewards.functions]


def _device(place: Placement) -> str:
    return "cuda" if place.gpus else "cpu"
