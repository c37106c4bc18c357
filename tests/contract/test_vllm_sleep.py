"""vLLM that leaves the GPU between rollouts: in what order, and what a bad wake is seen by.

No test has a GPU. The engine is a real one on the CPU, where vLLM's `sleep` and `wake_up` stop and
start its scheduler for real and leave memory alone; weights that come back wrong are put there.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from tiny_networks import tiny_qwen3

from common.errors import RecipeError, RunError
from common.heavy import prepare_torchvision
from recipes import load_recipe
from rollout import Sampling, WeightMismatch
from rollout.sync import ModelSide, push_weights, verify_sync
from rollout.vllm_engine import VllmEngine
from rollout.weights import merged_tensors

prepare_torchvision()

START, IMAGES, LENGTH = 300, 64, 12
PROMPTS = [[1, 2, 3], list(range(50, 95))]
USES = ["generate", "apply_model", "collective_rpc", "reset_prefix_cache"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ar")
    tiny_qwen3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def started(folder) -> Iterator[VllmEngine]:
    engine = VllmEngine(folder, START, IMAGES, LENGTH, max_prompt_length=64, cache_gib=0.1)
    yield engine
    engine.close()


@pytest.fixture
def engine(started, monkeypatch) -> VllmEngine:
    """An engine that sleeps, as if it had been allowed to start so."""
    started._wake()
    monkeypatch.setattr(started, "_sleeps", True)
    return started


@pytest.fixture
def calls(engine, monkeypatch) -> list[tuple[str, dict]]:
    """What is asked of vLLM, in order."""
    made: list[tuple[str, dict]] = []

    def recorded(name, original, *given, **options):
        made.append((name, options))
        return original(*given, **options)

    for name in ["sleep", "wake_up", *USES]:
        original = getattr(engine._llm, name)
        monkeypatch.setattr(engine._llm, name, partial(recorded, name, original))
    return made


def side(model, step: int = 0) -> ModelSide:
    return ModelSide(model, step, PROMPTS, START, IMAGES)


def moved(size: float):
    model, generator = tiny_qwen3(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def draw(engine: VllmEngine) -> torch.Tensor:
    return engine.generate(PROMPTS, 2, Sampling(), [1, 2, 3, 4]).completion_ids


def test_nothing_is_asked_of_it_asleep_and_it_sleeps_after_each_draw(engine, calls):
    model = tiny_qwen3()
    for step in range(2):
        push_weights(engine, side(model, step))
        for _ in range(2):
            draw(engine)
            assert calls[-1] == ("sleep", {"level": 1})
            assert engine._llm.llm_engine.is_sleeping()
    verify_sync(engine, side(model, 2))
    assert not engine._llm.llm_engine.is_sleeping()  # the draw comes next
    draw(engine)
    engine.fingerprint()
    asleep = False
    for name, _ in calls:
        assert asleep == (name == "wake_up"), calls
        asleep = name == "sleep"
    # Each draw, and each wake but the first start.
    assert [name for name, _ in calls].count("sleep") == 5
    assert [name for name, _ in calls].count("wake_up") == 5


def test_what_it_draws_is_what_it_draws_awake(engine, monkeypatch):
    push_weights(engine, side(moved(0.02)))
    found = [draw(engine), draw(engine)]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_sleeps", False)
        expected = draw(engine)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@pytest.fixture
def bad_wake(engine, monkeypatch) -> None:
    """From now on each wake brings other weights, so little that no log-prob would show it."""
    wake_up = engine._llm.wake_up

    def wrong() -> bool:
        awake = wake_up()
        engine._reload(dict(merged_tensors(moved(1e-6))))
        return awake

    push_weights(engine, side(tiny_qwen3()))
    draw(engine)
    monkeypatch.setattr(engine._llm, "wake_up", wrong)


def test_a_wake_to_other_weights_stops_the_next_draw(engine, bad_wake):
    with pytest.raises(WeightMismatch, match="changed since the last push"):
        draw(engine)


def test_a_wake_to_other_weights_is_seen_by_whoever_reads_them(engine, bad_wake):
    with pytest.raises(WeightMismatch, match="changed since the last push"):
        engine.fingerprint()


def test_a_wake_to_other_weights_is_mended_by_a_push_and_seen_after_it(engine, bad_wake):
    push_weights(engine, side(moved(0.02), 1))
    draw(engine)
    with pytest.raises(WeightMismatch, match="changed since the last push"):
        draw(engine)
    verify_sync(engine, side(moved(0.02), 2))
    draw(engine)
    with pytest.raises(WeightMismatch, match="changed since the last push"):
        draw(engine)


def test_weights_that_nobody_read_are_read_before_it_sleeps(engine, bad_wake):
    engine.load_weights(merged_tensors(moved(0.02)), 1)
    draw(engine)
    with pytest.raises(WeightMismatch, match="changed since the last push"):
        draw(engine)


def test_the_cpu_has_no_sleep(folder):
    with pytest.raises(RunError, match=r"rollout\.vllm\.sleep[\s\S]*Fix: rollout\.vllm\.sleep=fal"):
        VllmEngine(folder, START, IMAGES, LENGTH, sleep=True)


@pytest.mark.parametrize(
    "overlap", [["rollout.waves=2"], ["rollout.workers=2", "rollout.max_policy_lag=1"]]
)
def test_it_does_not_sleep_where_stages_overlap(overlap):
    asked = ["rollout.engine=vllm", "rollout.vllm.sleep=true"]
    assert load_recipe("geneval-scenes", asked)
    with pytest.raises(RecipeError, match=r"set rollout\.waves to 1"):
        load_recipe("geneval-scenes", [*asked, *overlap])
