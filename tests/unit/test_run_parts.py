"""The parts of a GRPO run: its prompts, paths and options, held-out curve, quiet and signals."""

import json
import logging
import signal
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_rollouts import engine_of
from tiny_policy import write_recipe

import rl.build
import rl.run
import rl.stages
from common.errors import DataError, RunError
from common.progress import SilentProgress
from data.prompts import draw_records, training_records
from evals.suites import load_suite
from policy.quiet import quiet_libraries
from recipes import load_recipe
from recipes.locate import located
from rewards.runner import Scored
from rl.callbacks import InterruptCallback, JournalCallback
from rl.checkpoints import publish
from rl.rollouts import Sampler
from rl.run import (
    _held_out,
    check_processes,
    resume,
    trainer_config,
)
from rl.stages import Journaled, build_engine, open_stages, placements
from rl.trl_release import GRPOConfig
from rollout.build import EngineSpec
from rollout.decode import Decode
from rollout.engine import Sampling


def recipe_of(*overrides: str):
    return load_recipe("geneval-scenes", list(overrides)).recipe


# --- prompts -------------------------------------------------------------------------------------


def drawn(steps, per_step=5, tasks=None, seed=0, source="scenes"):
    return draw_records(source, "train", tasks, steps=steps, per_step=per_step, seed=seed)


def test_only_a_newline_ends_a_line_of_a_prompt_file(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes('{"prompt": "a\u2028b"}\r\n{"prompt": "c\u0085d"}\n'.encode())
    assert [r["prompt"] for r in training_records(str(file), "all")] == ["a\u2028b", "c\u0085d"]


def test_a_prompt_file_is_utf_8_with_or_without_a_mark(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "café"}\n', encoding="utf-8-sig")
    assert [r["prompt"] for r in training_records(str(file), "all")] == ["café"]
    file.write_text('{"prompt": "café"}\n', encoding="latin-1")
    with pytest.raises(DataError, match=r"p\.jsonl: 'utf-8' codec(?s:.*)Fix: make it a UTF-8"):
        training_records(str(file), "all")


def test_a_step_s_prompts_depend_on_seed_and_step_alone():
    short, long, other = drawn(3), drawn(7), drawn(3, seed=1)
    assert len(short) == 15
    assert long[:15] == short
    assert other != short
    assert short[:5] != short[5:10]


def test_tasks_are_drawn_as_often_as_their_weights_say():
    records = drawn(60, 10, {"position": 3, "counting": 1, "colors": 0})
    counts = Counter(record["metadata"]["tag"] for record in records)
    assert set(counts) == {"position", "counting"}
    assert 0.68 < counts["position"] / 600 < 0.82
    counts = Counter(record["metadata"]["tag"] for record in drawn(60, 10))
    assert len(counts) == 6
    assert min(counts.values()) > 65


@pytest.fixture
def uneven(tmp_path) -> str:
    """Nine records with one tag and one with another."""
    lines = [
        {"prompt": f"p{i}", "metadata": {"tag": "rare" if i == 9 else "common"}, "size": i}
        for i in range(10)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_records_of_a_file_keep_their_columns_and_are_drawn_alike(uneven):
    records = drawn(100, 10, source=uneven)
    counts = Counter(record["prompt"] for record in records)
    assert len(counts) == 10
    # 1,000 draws of 1 in 10: 5 standard deviations are 47.
    assert all(abs(count - 100) < 48 for count in counts.values())
    assert all(r["prompt"] == f"p{r['size']}" for r in records)
    weighted = drawn(100, 10, {"rare": 1, "common": 1}, source=uneven)
    assert 420 < sum(r["metadata"]["tag"] == "rare" for r in weighted) < 580


def test_a_task_that_a_file_lacks_is_refused(uneven):
    with pytest.raises(DataError, match=r"prompts\.tasks\.rre: no record.*has common, rare"):
        drawn(1, 1, {"rre": 1, "common": 1}, source=uneven)


# --- paths ---------------------------------------------------------------------------------------


def test_files_are_found_beside_the_recipe_and_beside_those_it_extends(
    tmp_path, monkeypatch, policy_folder
):
    write_recipe(tmp_path / "parent", policy_folder)
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "recipe.yaml").write_text(
        "extends: ../parent/recipe.yaml\nname: child\nprompts: {source: mine.jsonl}\n"
    )
    (tmp_path / "child" / "mine.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe("child/recipe.yaml", ["policy.path=relative/policy"])
    recipe = located(loaded.recipe, loaded.files)
    assert recipe.rewards.functions[0].use == f"{tmp_path / 'parent' / 'redness.py'}:redness"
    assert recipe.prompts.source == str(tmp_path / "child" / "mine.jsonl")
    assert recipe.policy.path == str(tmp_path / "relative" / "policy")


def test_paths_among_the_arguments_of_rewards_are_the_same_from_any_folder(
    tmp_path, monkeypatch, policy_folder
):
    folder = tmp_path / "mine"
    write_recipe(folder, policy_folder)
    for name in ("weights.pt", "token", "clip.pt"):
        (folder / name).write_text("x")
    (folder / "scenes").mkdir()
    (tmp_path / "here.pt").write_text("x")
    question = "Rate this picture. " * 400
    args = {
        "weights": "weights.pt", "token_file": "token", "cache": "./judge-cache", "head": "here.pt",
        "networks": {"clip": {"weights": "clip.pt"}}, "more": ["weights.pt", 3, None],
        "detector": "scenes", "model": "owner/repository", "question": question, "home": "~/w.pt",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe("mine/recipe.yaml")
    [function] = loaded.recipe.rewards.functions[:1]
    rewards = loaded.recipe.rewards.model_copy(
        update={"functions": (function.model_copy(update={"args": args}),)}
    )
    recipe = loaded.recipe.model_copy(update={"rewards": rewards})
    [got] = located(recipe, loaded.files).rewards.functions
    assert got.args == {
        "weights": f"{folder}/weights.pt", "token_file": f"{folder}/token",
        "cache": f"{folder}/judge-cache", "head": f"{tmp_path}/here.pt",
        "networks": {"clip": {"weights": f"{folder}/clip.pt"}},
        "more": [f"{folder}/weights.pt", 3, None],
        "detector": "scenes", "model": "owner/repository", "question": question,
        "home": str(Path.home() / "w.pt"),
    }  # fmt: skip


def test_names_are_not_paths():
    loaded = load_recipe("geneval-scenes")
    assert located(loaded.recipe, loaded.files) == loaded.recipe


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(RunError, match=r"recipe\.yaml is missing"):
        resume(tmp_path)


# --- options -------------------------------------------------------------------------------------


def test_the_recipe_s_options_reach_trl(tmp_path):
    config = trainer_config(
        recipe_of(
            "rollout.group_size=6", "rollout.prompts_per_step=4", "train.micro_batch=8",
            "algorithm.beta=0.03", "algorithm.clip_low=0.1", "algorithm.clip_high=0.3",
            "algorithm.advantage_scale=none", "algorithm.importance_cap=3.0",
            "rollout.temperature=0.9", "train.grad_clip=null", "train.weight_decay=0.01",
            "train.warmup_steps=7", "train.learning_rate=2e-4", "save.every=11",
            f"seed={2**40 + 5}",
        ),
        tmp_path,
        36,
    )  # fmt: skip
    expected = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 3,
        "generation_batch_size": 24,
        "num_generations": 6,
        "max_completion_length": 36,
        "beta": 0.03,
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "scale_rewards": "none",
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_clip_max": 3.0,
        "temperature": 0.9,
        "max_grad_norm": 0.0,
        "weight_decay": 0.01,
        "warmup_steps": 7,
        "learning_rate": 2e-4,
        "save_steps": 11,
        "seed": 5,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (1.0, False, "auto", False, None)),
        (["rollout.vllm={cache_gib: 20, compile: true}"], (20.0, True, "auto", False, None)),
        (["rollout.vllm={cache_dtype: fp8, sleep: true}"], (1.0, False, "fp8", True, None)),
        (["rollout.lora_sync=adapter", "policy.lora={rank: 8}"], (1.0, False, "auto", False, 8)),
    ],
)
def test_the_recipe_s_options_reach_vllm(policy, monkeypatch, overrides, expected):
    monkeypatch.setattr(EngineSpec, "build", lambda spec, events: spec)
    recipe = recipe_of("rollout.engine=vllm", *overrides)
    spec = build_engine(recipe, policy, 64, None, Journaled())
    vllm = (spec.cache_gib, spec.compile_model, spec.cache_dtype, spec.sleep)
    assert (*vllm, spec.lora_rank) == expected


def test_reward_workers_have_time_for_rewards_that_hang():
    """Two batches of 32 and each of 72 pictures alone, with rewards that may take 90 s."""
    functions = "rewards.functions=[{use: geneval}, {use: ocr, timeout_s: 90}]"
    step = ("rollout.prompts_per_step=12", "rollout.group_size=12")
    places = placements(recipe_of("rewards.workers=2", "decode.workers=1", functions, *step))
    assert places["rewards"].timeout_s > 600 + (3 + 72) * 90
    assert places["decode"].timeout_s == 600


@pytest.mark.parametrize(("whole_batch", "pictures"), [([], 18), (["ranked"], 144)])
def test_reward_workers_have_time_for_all_pictures_if_one_gets_all(
    monkeypatch, whole_batch, pictures
):
    """Of 144 pictures 8 workers get 18 each, unless a reward compares them all."""
    started = []

    def cluster(address, places):
        started.extend(places)
        raise RunError("far enough")

    monkeypatch.setattr(rl.stages, "ray_cluster", cluster)
    step = ("rollout.prompts_per_step=12", "rollout.group_size=12")
    recipe, rewards = (
        recipe_of("rewards.workers=8", *step),
        SimpleNamespace(whole_batch=whole_batch),
    )
    with pytest.raises(RunError, match="far enough"), ExitStack() as parts:
        open_stages(recipe, None, rewards, 1, Journaled(), parts)
    [place] = started
    assert (5 + pictures) * 60 < place.timeout_s - 600 < (30 + pictures) * 60


# --- the engine's weights ------------------------------------------------------------------------


def test_the_held_out_curve_is_drawn_with_the_weights_of_its_step(policy):
    events = []

    class Watched:
        def generate(self, prompt_ids, n, sampling, seeds):
            events.append(("generate", n, sampling, tuple(seeds)))
            return engine_of(policy).generate(prompt_ids, n, sampling, seeds)

    recipe = recipe_of("evals.limit=3", "decode.eval.steps=1", "rollout.temperature=0.5", "seed=9")
    sampler = Sampler(policy, Watched(), Sampling(0.5), Decode(1, 1.0), run_seed=9)
    suite = load_suite(recipe.evals.suite, recipe.evals.limit)
    held_out = _held_out(recipe, suite, sampler, lambda step: events.append(("sync", step)))
    first, second = held_out(0), held_out(10)
    assert [event[:2] for event in events] == [
        ("sync", 0), ("generate", 1), ("sync", 10), ("generate", 1),
    ]  # fmt: skip
    # The same prompts and seeds at every step of every run, at temperature 1.
    assert events[1] == events[3]
    assert events[1][2] == Sampling()
    assert first == second
    assert set(first) > {"strict", "per_task"}


def test_the_journal_learns_of_memory_that_runs_out_in_a_held_out_evaluation(policy, monkeypatch):
    recipe = recipe_of("evals.limit=3", "decode.eval.steps=1")
    sampler = Sampler(policy, engine_of(policy), Sampling(), Decode(1, 1.0), run_seed=9)
    condition_rows = policy.condition_rows

    def tight(prompt_ids, completion_ids):
        torch.empty(2**50 if len(prompt_ids) > 2 else 1)
        return condition_rows(prompt_ids, completion_ids)

    monkeypatch.setattr(policy, "condition_rows", tight)
    suite = load_suite(recipe.evals.suite, recipe.evals.limit)
    _held_out(recipe, suite, sampler, lambda step: None)(0)
    [event] = sampler.events
    assert (event["stage"], event["micro_batch"]) == ("score", 2)


# --- quiet and signals ---------------------------------------------------------------------------


def test_libraries_are_quiet_inside_and_as_before_afterwards(policy, tmp_path, capfd, caplog):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (transformers_logging, diffusers_logging)
    names = ("transformers", "diffusers", "trl")
    before = [logging.getLogger(name).level for name in names]
    for library in libraries:
        library.enable_progress_bar()
    with quiet_libraries():
        with quiet_libraries():
            pass
        for name in names:
            logging.getLogger(f"{name}.somewhere").warning("chatter of %s", name)
            logging.getLogger(f"{name}.somewhere").error("trouble of %s", name)
        assert not any(library.is_progress_bar_enabled() for library in libraries)
        policy.ar.save_pretrained(tmp_path / "ar")
    assert capfd.readouterr().err.count("Writing model shards") == 0
    assert "chatter" not in caplog.text
    assert all(library.is_progress_bar_enabled() for library in libraries)
    assert [logging.getLogger(name).level for name in names] == before
    with pytest.raises(KeyError), quiet_libraries():
        raise KeyError
    assert [logging.getLogger(name).level for name in names] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    before = signal.getsignal(number)
    said: list[str] = []
    progress = SilentProgress()
    progress.line = said.append
    callback = InterruptCallback(progress)
    control = type("Control", (), {"should_save": False, "should_training_stop": False})()
    try:
        callback.on_train_begin(None, None, control)
        callback.on_step_end(None, None, control)
        assert not control.should_training_stop
        signal.raise_signal(number)
        assert said == [
            "stopping after this step; interrupt again to stop at once, without its checkpoint"
        ]
        callback.on_step_end(None, None, control)
        assert control.should_save
        assert control.should_training_stop
        assert signal.getsignal(number) == before
    finally:
        callback.give_back()
    assert signal.getsignal(number) == before


def test_a_run_that_a_script_began_in_the_background_goes_on_ignoring_interrupts():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    callback = InterruptCallback(SilentProgress())
    try:
        callback.on_train_begin(None, None, None)
        signal.raise_signal(signal.SIGINT)
        assert not callback.interrupted
        signal.raise_signal(signal.SIGTERM)
        assert callback.interrupted
        callback.give_back()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        callback.give_back()
        signal.signal(signal.SIGINT, before)


def test_signals_are_given_back_when_training_fails(policy_folder, tmp_path, monkeypatch):
    from rl.grpo import ImageGRPOTrainer
    from rl.run import train

    def fails(self, *args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(ImageGRPOTrainer, "rollout", fails)
    before = signal.getsignal(signal.SIGINT)
    loaded = load_recipe(write_recipe(tmp_path / "recipe", policy_folder))
    with pytest.raises(ZeroDivisionError):
        train(loaded, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == before


def test_the_example_recipe_names_a_reward_beside_it():
    root = Path(__file__).resolve().parents[2]
    loaded = load_recipe(root / "examples" / "custom_reward" / "recipe.yaml")
    uses = [f.use for f in located(loaded.recipe, loaded.files).rewards.functions]
    assert f"{root / 'examples' / 'custom_reward' / 'warmth.py'}:warmth" in uses


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.engine=vllm", "rollout.engine=transformers"),
        ("rollout.workers=2", "rollout.workers=0"),
        ("rollout.prompts_per_step=9", r"rollout\.prompts_per_step=12"),
        ("train.micro_batch=24", "24 does not divide the 36 images"),
    ],
)
def test_what_several_processes_cannot_share_is_refused(override, words):
    recipe = recipe_of(override)
    check_processes(recipe, 1)
    with pytest.raises(RunError, match=words):
        check_processes(recipe, 4)


@pytest.mark.parametrize(("kind", "wrote", "now"), [("grpo", 2, 1), ("grpo", 1, 2), ("zero", 2, 4)])
def test_a_run_is_resumed_with_as_many_processes_as_it_had(tmp_path, monkeypatch, kind, wrote, now):
    """Each process draws samples of its own, and ZeRO divides the optimizer among them."""
    grpo = kind == "grpo"
    write_recipe(tmp_path, tmp_path) if grpo else (tmp_path / "recipe.yaml").write_text(
        "extends: tiny/pretrain\ntrain: {optimizer: adamw, deepspeed: zero2}\n"
    )
    (tmp_path / "staged").mkdir()
    monkeypatch.setenv("WORLD_SIZE", str(wrote))
    publish(tmp_path / "staged", tmp_path / "checkpoints", 2, keep_last=2)
    monkeypatch.setenv("WORLD_SIZE", str(now))
    words = rf"step-000002 was written by {wrote} training processes, and now there are {now}"
    with pytest.raises(RunError, match=rf"{words}[\s\S]*resume with {wrote}"):
        (resume if grpo else rl.build.resume)(tmp_path)


def test_a_step_is_divided_among_processes(tmp_path, monkeypatch):
    """12 prompts x 12 images; whatever is asked for, a process has 36 of them."""
    monkeypatch.setattr(rl.run, "process_count", lambda: 4)
    # Without starting them: what torch.distributed would answer.
    monkeypatch.setattr(GRPOConfig, "world_size", 4)
    for micro_batch, pieces in (("null", 1), (12, 3), (72, 1)):
        recipe = recipe_of("policy.device=cpu", f"train.micro_batch={micro_batch}")
        check_processes(recipe, 4)
        config = trainer_config(recipe, tmp_path, 36)
        assert config.per_device_train_batch_size * pieces == 36
        assert config.gradient_accumulation_steps == pieces
        assert config.generation_batch_size == 144


def test_details_of_other_kinds_are_left_out_of_the_means():
    callback = JournalCallback(None, SilentProgress(), [], [])
    details = [
        {"mine": {"extra": "two cats too many", "strict": True, "soft": [0.5]}},
        {"mine": {"extra": None}, "geneval": {"extra": 2, "strict": 1.0}},
        {"geneval": {"extra": 1, "strict": 0.0}},
    ]
    scores = [Scored(1.0, {}, details=of_one) for of_one in details]
    callback.trainer = SimpleNamespace(all_scores=scores)
    assert callback._details() == {"strict": 0.5, "extra_objects": 1.5}


def test_why_pictures_have_no_score_is_counted():
    callback = JournalCallback(None, SilentProgress(), [], [])
    failed = [("a", "hangs")] * 3 + [("b", "HTTP 500")] * 2 + [("a", "odd"), ("a", "rare")]
    scores = [Scored(None, {name: None, "c": 1.0}, {name: why, "c": "x"}) for name, why in failed]
    callback.trainer = SimpleNamespace(all_scores=scores)
    assert callback._missing() == {
        "missing_reasons": {"a: hangs": 3, "b: HTTP 500": 2, "a: odd": 1}
    }
    callback.trainer = SimpleNamespace(all_scores=[Scored(1.0, {"c": 1.0})])
    assert callback._missing() == {}


def test_a_small_learning_rate_is_shown(tmp_path):
    shown = []

    class Shown(SilentProgress):
        def advance(self, task, n=1, **facts):
            shown.append(facts)

    recipe = load_recipe("tiny/pretrain").recipe
    with rl.build.RunLog(recipe, tmp_path, Shown(), nullcontext()) as log:
        log.begin()
        log.row(1, {"loss": 0.5, "learning_rate": 5e-6})
    assert shown == [{"loss": "0.5000", "learning_rate": "5.000e-06"}]
