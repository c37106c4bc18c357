"""Workers on Ray and the contract of an engine: same samples, proved weights, no loss unseen."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from tiny_policy import CODES, new_policy

from common.errors import RunError
from rollout import Sampling, WeightMismatch, actors, fingerprint_tensors
from rollout.build import EngineSpec
from rollout.cluster import Placement, check_room, ray_cluster
from rollout.ray_pool import RayPool
from rollout.sync import ModelSide, push_weights, verify_sync
from rollout.transformers_engine import TransformersEngine
from rollout.weights import merged_tensors

PROMPTS = [[1, 2, 3], list(range(10, 30)), list(range(50, 95))]
N = 4
SEEDS = list(range(len(PROMPTS) * N))


@pytest.fixture(scope="module")
def spec(policy_folder) -> EngineSpec:
    config = new_policy().config
    return EngineSpec(
        "transformers",
        str(policy_folder / "ar"),
        config.image_start_id,
        CODES,
        config.num_tokens,
        config.pad_id,
        "float32",
        max_prompt_length=64,
    )


@pytest.fixture(scope="module")
def pool(spec) -> Iterator[RayPool]:
    from ray import cloudpickle

    # Workers cannot import this file: its functions travel as they are.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    place = Placement("rollout", 2, timeout_s=240)
    with ray_cluster(None, [place]):
        pool = RayPool(spec.build, place, torch.float32, events=[], busy=[])
        pool.actors.await_ready()
        yield pool
        pool.close()


@pytest.fixture
def trainer(policy, pool) -> ModelSide:
    """The trainer's side, its weights moved away from those that the workers started with."""
    with torch.no_grad():
        for parameter in policy.ar.parameters():
            parameter.mul_(1.01)
    config = policy.config
    side = ModelSide(policy.ar, 7, PROMPTS, config.image_start_id, CODES)
    side.model = policy.ar
    return side


def in_worker(pool: RayPool, index: int, function, *arguments):
    import ray

    return ray.get(pool.actors.handles[index].__ray_call__.remote(function, *arguments))


def own_engine(trainer: ModelSide, spec: EngineSpec) -> TransformersEngine:
    return TransformersEngine(
        trainer.model, spec.image_start_id, CODES, spec.completion_length, spec.pad_id
    )


def process_of(worker) -> int:
    return os.getpid()


# --- what one engine promises --------------------------------------------------------------------


def test_workers_draw_what_one_engine_draws(pool, trainer, spec):
    verify_sync(pool, trainer)
    expected = own_engine(trainer, spec).generate(PROMPTS, N, Sampling(0.9, 20), SEEDS)
    found = pool.generate(PROMPTS, N, Sampling(0.9, 20), SEEDS)
    assert found.prompt_ids == expected.prompt_ids
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.allclose(found.behaviour_logprobs, expected.behaviour_logprobs, atol=1e-5)


def test_every_worker_holds_what_was_pushed(pool, trainer):
    push_weights(pool, trainer)
    expected = fingerprint_tensors(merged_tensors(trainer.model))
    for index in range(2):
        assert in_worker(pool, index, lambda w: w.engine.fingerprint()) == expected
    assert in_worker(pool, 0, process_of) != in_worker(pool, 1, process_of) != os.getpid()


def test_workers_have_the_priority_of_the_run(pool):
    pool.actors.await_ready()
    assert in_worker(pool, 0, lambda worker: os.nice(0)) == os.nice(0)


def count_fingerprints(worker) -> None:
    original, worker.fingerprints = worker.engine.fingerprint, 0

    def counted() -> str:
        worker.fingerprints += 1
        return original()

    worker.engine.fingerprint = counted


def uncount_fingerprints(worker) -> int:
    del worker.engine.fingerprint
    return worker.fingerprints


def test_a_push_is_read_back_once_by_each_worker(pool, trainer):
    for index in range(2):
        in_worker(pool, index, count_fingerprints)
    push_weights(pool, trainer)
    assert [in_worker(pool, index, uncount_fingerprints) for index in range(2)] == [1, 1]


def test_more_workers_than_prompts_is_no_matter(pool, trainer, spec):
    push_weights(pool, trainer)
    expected = own_engine(trainer, spec).generate(PROMPTS[:1], N, Sampling(), SEEDS[:N])
    found = pool.generate(PROMPTS[:1], N, Sampling(), SEEDS[:N])
    assert torch.equal(found.completion_ids, expected.completion_ids)


def test_what_the_engine_refuses_is_said_as_the_engine_says_it(pool):
    before = pool.actors.replaced
    with pytest.raises(IndexError, match="out of range"):
        pool.generate([[10**6]], 1, Sampling(), [0])
    with pytest.raises(RunError, match="3 seeds for 1 prompts x 4 samples"):
        pool.generate([[1]], 4, Sampling(), [0, 1, 2])
    assert pool.actors.replaced == before


def run_out_of_memory(worker, most: int) -> None:
    """Ask the allocator for four pebibytes where there are more sequences than memory is for."""

    def tight(module, given, options):
        if len(options["input_ids"]) > most:
            torch.empty(2**50)

    worker.hook = worker.engine.model.model.register_forward_pre_hook(tight, with_kwargs=True)


def test_memory_that_runs_out_in_workers_is_told_and_changes_no_token(pool, trainer, spec):
    push_weights(pool, trainer)
    expected = own_engine(trainer, spec).generate(PROMPTS, N, Sampling(), SEEDS)
    for index in range(2):
        in_worker(pool, index, run_out_of_memory, N)
    pool.actors._events.clear()
    found = pool.generate(PROMPTS, N, Sampling(), SEEDS)
    again = pool.generate(PROMPTS, N, Sampling(), SEEDS)
    for index in range(2):
        in_worker(pool, index, lambda worker: worker.hook.remove())
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(again.completion_ids, expected.completion_ids)
    # Two prompts were the share of one worker and one that of the other, who had room for it.
    [event] = pool.actors._events
    assert (event["event"], event["stage"]) == ("micro_batch_halved", "rollout")
    assert (event["micro_batch"], event["worker"]) == (N, 0)
    assert "can't allocate memory" in event["reason"]


# --- weights that did not arrive -----------------------------------------------------------------


def skip_loading(worker) -> None:
    worker.engine.load_weights = lambda tensors, step: list(tensors)


def load_stale(worker) -> None:
    """Load the push before instead of this one."""
    original, stale = worker.engine.load_weights, list(worker.engine_weights)

    def load(tensors, step):
        list(tensors)
        original(iter(stale), step - 1)

    worker.engine.load_weights = load


def remember(worker) -> None:
    worker.engine_weights = [(n, t.clone()) for n, t in merged_tensors(worker.engine.model)]


def add_twice(worker) -> None:
    """As if a LoRA delta, a change of one matrix, were merged twice."""
    original = worker.engine.load_weights

    def load(tensors, step):
        original(tensors, step)
        with torch.no_grad():
            worker.engine.model.model.layers[0].mlp.up_proj.weight.add_(1e-3)

    worker.engine.load_weights = load


def drop_one(worker) -> None:
    original = worker.engine.load_weights

    def load(tensors, step):
        original(list(tensors)[:-1], step)

    worker.engine.load_weights = load


def restore(worker) -> None:
    worker.engine.__dict__.pop("load_weights", None)


@pytest.mark.parametrize("mutation", [skip_loading, load_stale, add_twice, drop_one])
@pytest.mark.parametrize(
    ("victims", "told"),
    [((1,), r": \[0\]; \w+: \[1\]\)|^rollout worker 1: "), ((0, 1), None)],
    ids=["one", "all"],
)
def test_weights_that_did_not_arrive_stop_the_run_at_once(pool, trainer, mutation, victims, told):
    push_weights(pool, trainer)
    for index in victims:
        in_worker(pool, index, remember)
        in_worker(pool, index, mutation)
    with torch.no_grad():
        trainer.model.model.layers[0].self_attn.q_proj.weight.mul_(1.001)
    try:
        with pytest.raises(WeightMismatch, match=told):
            push_weights(pool, trainer)
    finally:
        for index in victims:
            in_worker(pool, index, restore)
    push_weights(pool, trainer)


def test_a_worker_that_was_not_asked_proves_its_weights_before_it_samples(pool, trainer):
    """As after a loss during the push, when the others are asked whether they are there."""
    pool.actors.await_ready()
    push_weights(pool, trainer)
    in_worker(pool, 1, skip_loading)
    with torch.no_grad():
        trainer.model.model.layers[0].self_attn.q_proj.weight.mul_(1.001)
    pool.load_weights(trainer.pushed_tensors(), 8)
    pool.actors._free.remove(1)
    pool.fingerprint()
    pool.actors._free.append(1)
    try:
        with pytest.raises(WeightMismatch, match=r"^rollout worker 1: .*was not asked"):
            pool.generate(PROMPTS, N, Sampling(), SEEDS)
    finally:
        in_worker(pool, 1, restore)
    push_weights(pool, trainer)


# --- weights that arrived, and logits that are wrong ----------------------------------------------


def break_decoding(worker) -> None:
    """The kernel for one token at a time is wrong; that for a whole prompt is right."""

    def wrong(module, given, output):
        return (output[0] * (1.1 if output[0].shape[1] == 1 else 1.0), *output[1:])

    layer = worker.engine.model.model.layers[-1].self_attn
    worker.mend = layer.register_forward_hook(wrong).remove


def keep_old_prompts(worker) -> None:
    """Keys and values of prompts stay those of the present weights, as a stale prefix cache's."""
    from copy import deepcopy

    decoder = worker.engine.model.model
    now, old = decoder.forward, deepcopy(decoder)

    def forward(**options):
        return (old if options["input_ids"].shape[1] > 1 else now)(**options)

    decoder.forward = forward
    worker.mend = lambda: decoder.__dict__.pop("forward")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", [break_decoding, keep_old_prompts])
def test_a_worker_with_the_right_weights_and_wrong_logits_stops_the_run_at_once(
    pool, trainer, fault, victim
):
    pool.actors.await_ready()
    verify_sync(pool, trainer)
    in_worker(pool, victim, fault)
    with torch.no_grad():
        trainer.model.model.layers[0].self_attn.v_proj.weight.mul_(1.1)
    push_weights(pool, trainer)  # the fingerprints are right
    try:
        with pytest.raises(WeightMismatch, match=f"rollout worker {victim}'s log-probs of probe"):
            verify_sync(pool, trainer)
    finally:
        in_worker(pool, victim, lambda worker: worker.mend())
    verify_sync(pool, trainer)


def test_each_worker_draws_all_probes_and_the_trainer_computes_once_what_is_equal(
    pool, trainer, spec
):
    pool.actors.await_ready()
    own, passes = trainer.completion_logprobs, []
    trainer.completion_logprobs = lambda *given: passes.append(own(*given)) or passes[-1]
    verify_sync(pool, trainer)
    assert len(passes) == 1
    probes = pool.probe(PROMPTS, 3)
    [expected] = own_engine(trainer, spec).probe(PROMPTS, 3).values()
    assert list(probes) == ["rollout worker 0", "rollout worker 1"]
    for batch in probes.values():
        assert batch.prompt_ids == PROMPTS
        assert torch.equal(batch.completion_ids, expected.completion_ids)


# --- workers that are lost -----------------------------------------------------------------------


def die_at_next_generate(worker) -> None:
    worker.engine.generate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def hang_at_next_generate(worker) -> None:
    worker.engine.generate = lambda *_: time.sleep(3600)


@pytest.mark.parametrize("loss", [die_at_next_generate, hang_at_next_generate])
def test_a_lost_worker_is_replaced_and_nothing_changes(pool, trainer, spec, loss, monkeypatch):
    pool.actors.await_ready()  # one that joins during the call may find all work given out
    push_weights(pool, trainer)
    expected = own_engine(trainer, spec).generate(PROMPTS, N, Sampling(), SEEDS)
    monkeypatch.setattr(pool.actors, "_placement", Placement("rollout", 2, timeout_s=10))
    replaced = pool.actors.replaced
    in_worker(pool, 1, loss)
    found = pool.generate(PROMPTS, N, Sampling(), SEEDS)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert pool.actors.replaced == replaced + 1
    event = pool.actors._events[-1]
    assert (event["event"], event["section"]) == ("worker_replaced", "rollout")
    assert (event["worker"], event["during"]) == (1, "generate")
    assert event["reason"]
    assert pool.fingerprint() == fingerprint_tensors(merged_tensors(trainer.model))


def test_an_idle_worker_that_does_not_answer_is_replaced(pool, trainer, spec, monkeypatch):
    """As after a loss, when the others are asked whether they are there."""
    pool.actors.await_ready()
    push_weights(pool, trainer)
    expected = own_engine(trainer, spec).generate(PROMPTS, N, Sampling(), SEEDS)
    events = len(pool.actors._events)
    os.kill(in_worker(pool, 1, process_of), signal.SIGSTOP)
    with monkeypatch.context() as limits:
        limits.setattr(actors, "ANSWER_S", 0.5)
        pool.actors._ask_idle()
        found = pool.generate(PROMPTS, N, Sampling(), SEEDS)
        pool.fingerprint()
        assert len(pool.actors._events) == events  # it is not waited for, and has time left
        limits.setattr(pool.actors, "_placement", Placement("rollout", 2, timeout_s=0.1))
        time.sleep(max(0.0, pool.actors._asked[1] + 0.5 - time.perf_counter()))
        pool.actors.present()
    assert torch.equal(found.completion_ids, expected.completion_ids)
    [event] = pool.actors._events[events:]
    assert (event["worker"], event["during"]) == (1, "idle")
    assert event["reason"] == "no answer for 0.1 s"
    pool.actors.await_ready()
    push_weights(pool, trainer)


def die_when_loading(worker) -> None:
    worker.engine.load_weights = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_a_replacement_that_is_lost_as_well_is_replaced(pool, trainer, spec):
    pool.actors.await_ready()  # with one of them alone the replacement would have to load at once
    push_weights(pool, trainer)
    expected = own_engine(trainer, spec).generate(PROMPTS, N, Sampling(), SEEDS)
    replaced = pool.actors.replaced
    in_worker(pool, 0, die_at_next_generate)
    first = pool.generate(PROMPTS, N, Sampling(), SEEDS)
    pool.actors.await_ready()
    in_worker(pool, 0, die_when_loading)  # the new one has not loaded the push yet
    found = [first, pool.generate(PROMPTS, N, Sampling(), SEEDS)]
    assert pool.actors.replaced == replaced + 2
    for batch in found:
        assert torch.equal(batch.completion_ids, expected.completion_ids)


def test_a_replacement_with_other_weights_stops_the_run(pool, trainer):
    pool.actors.await_ready()
    push_weights(pool, trainer)
    in_worker(pool, 0, die_at_next_generate)
    pool.generate(PROMPTS, N, Sampling(), SEEDS)
    pool.actors.await_ready()
    in_worker(pool, 0, skip_loading)
    with pytest.raises(WeightMismatch, match=r"^rollout worker 0: .*joins the others"):
        pool.generate(PROMPTS, N, Sampling(), SEEDS)
    in_worker(pool, 0, restore)
    push_weights(pool, trainer)


def test_workers_without_room_are_refused_before_anything_waits(pool):
    with pytest.raises(
        RunError,
        match=r"3000 CPU \(rollout\.workers: 3000 x 1\)[\s\S]*Fix: use fewer workers, or change "
        r"rollout\.ray\.cpus_per_worker; to resume, in recipe\.yaml",
    ):
        check_room([Placement("rollout", 3000)])
    with pytest.raises(
        RunError, match=r"0\.5 GPU \(decode\.workers: 1 x 0\.5\)[\s\S]*decode\.ray\.gpu"
    ):
        check_room([Placement("decode", 1, cpus=0.0, gpus=0.5)])
    with pytest.raises(
        RunError, match=r"2 judge \(rewards\.workers: 2 x 1\)[\s\S]*rewards\.ray\.resource;"
    ):
        check_room([Placement("rewards", 2, cpus=0.0, resource="judge")])


def test_a_worker_that_cannot_start_says_why(spec, pool, tmp_path):
    wrong = EngineSpec(**{**spec.__dict__, "engine": "vllm", "ar_folder": str(tmp_path)})
    broken = RayPool(wrong.build, Placement("rollout", 1, cpus=0.0, timeout_s=120), torch.float32)
    told = f"{tmp_path} has no config.json; give the ar folder of a policy"
    with pytest.raises(RunError, match=re.escape(f"rollout worker 0 cannot start: {told}") + "$"):
        broken.actors.await_ready()
    broken.close()
