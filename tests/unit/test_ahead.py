"""Drawing ahead: whose weights a sample has, what the correction makes of it, what is resumed."""

import time
from copy import deepcopy
from dataclasses import replace
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from test_grpo_trainer import (
    GROUP,
    PROMPTS,
    REWARDS,
    TEMPERATURE,
    Given,
    build,
    flat,
    token_logprobs,
    watch_batches,
)
from test_rollouts import engine_of

from common.errors import RecipeError, RunError
from common.progress import SilentProgress
from evals.alarms import alarms
from policy import Policy
from recipes import load_recipe
from rewards.composition import Composition
from rewards.spec import RewardSpec
from rl.callbacks import JournalCallback
from rollout import Sampling
from rollout.ahead import AheadEngine, Request
from rollout.sync import ModelSide, push_weights
from rollout.timeline import Interval, Timeline
from rollout.weights import merged_tensors

CAP = 2.0
CHANGES = {"train.steps": 3, "train.learning_rate": 0.02, "algorithm.importance_cap": CAP}


class Watched:
    """A plain copy of the policy's language model as engine; keeps what was asked, in order."""

    dtype = torch.float32

    def __init__(self, policy) -> None:
        self._policy = deepcopy(policy)
        self._policy.ar.__dict__.pop("forward", None)  # the trainer's, which calls its own model
        self._engine = engine_of(self._policy)
        self.calls: list[str] = []
        self.models: list = []

    def generate(self, *asked):
        self.calls.append("generate")
        self.models.append(deepcopy(self._policy))
        return self._engine.generate(*asked)

    def probe(self, *asked):
        self.calls.append("probe")
        return self._engine.probe(*asked)

    def load_weights(self, named_tensors, step):
        self.calls.append(f"load {step}")
        self._engine.load_weights(named_tensors, step)

    def fingerprint(self):
        return self._engine.fingerprint()

    def close(self): ...


def keep_rows(trainer) -> None:
    """Keep in `trainer.rows` what the journal would get."""
    trainer.rows = []
    journal = SimpleNamespace(write=trainer.rows.append)
    shown = JournalCallback(journal, SilentProgress(), [], [])
    shown.trainer = trainer
    trainer.add_callback(shown)


@pytest.fixture(scope="module")
def lagging(policy_folder, tmp_path_factory):
    """A trainer of three steps with large updates, its engine, and the batches it learnt from."""
    policy, folder = Policy.from_pretrained(policy_folder), tmp_path_factory.mktemp("lag")
    trainer = build(policy, folder, runner=Given(flat(REWARDS)), **CHANGES)
    trainer.save_to = folder / "saved"
    engine = Watched(policy)
    trainer.ahead = trainer.sampler.engine = AheadEngine(engine)
    config = policy.config

    def sync(step: int) -> None:
        side = ModelSide(policy.ar, step, [], config.image_start_id, config.num_image_tokens)
        push_weights(trainer.ahead, side)

    compute_loss = trainer.compute_loss

    def once_drawing(*given, **named):
        """The update waits for the draw's thread, which may get a core after all of it."""
        ending = time.monotonic() + 20
        wanted = min(trainer.state.global_step + 2, 3)
        while engine.calls.count("generate") < wanted and time.monotonic() < ending:
            time.sleep(0.001)
        return compute_loss(*given, **named)

    trainer.compute_loss = once_drawing
    trainer.vllm_generation._sync = sync
    keep_rows(trainer)
    batches = watch_batches(trainer)
    trainer.train()
    yield trainer, engine, batches
    trainer.ahead.close()


def test_each_step_but_the_first_is_drawn_before_the_update_ahead_of_it(lagging):
    _, engine, _ = lagging
    # The step's own, then one ahead; at the last step there is nothing further to draw.
    assert engine.calls == ["load 0", "generate", "generate", "load 1", "generate", "load 2"]


def test_behaviour_logprobs_are_of_the_policy_that_drew_and_the_ratio_is_truncated(lagging):
    _, engine, batches = lagging
    assert len(engine.models) == len(batches) == 3
    for step, (drew, batch) in enumerate(zip(engine.models, batches, strict=True)):
        for row in range(0, len(batch["completion_ids"]), 3):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            completion = batch["completion_ids"][row]
            with torch.no_grad():
                behaviour = token_logprobs(drew, prompt, completion)
            found = batch["sampling_per_token_logps"][row]
            torch.testing.assert_close(found, behaviour, atol=1e-4, rtol=0)
        old, behaviour = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
        ratio = (old - behaviour).exp()
        apart = float((ratio - 1).abs().max())
        assert apart < 1e-3 if step == 0 else apart > 0.05, (step, apart)
        torch.testing.assert_close(batch["importance_sampling_ratio"], ratio.clamp(max=CAP))


def test_the_tokens_are_those_of_the_older_weights(lagging):
    trainer, engine, _ = lagging
    prompts = [str(record["prompt"]) for record in trainer.records[6:9]]
    [request] = trainer.sampler.requests(prompts, GROUP, 2, 0)
    older = engine_of(engine.models[2]).generate(
        request.prompt_ids, request.n, request.sampling, request.seeds
    )
    assert torch.equal(trainer.last_rollout.completion_ids, older.completion_ids)
    newer = engine_of(trainer.sampler.policy).generate(
        request.prompt_ids, request.n, request.sampling, request.seeds
    )
    assert not torch.equal(older.completion_ids, newer.completion_ids)


def test_each_row_tells_its_lag_and_when_the_next_step_s_tokens_were_drawn(lagging):
    trainer, _, _ = lagging
    assert [row["policy_lag"] for row in trainer.rows] == [0, 1, 1]
    for row, drawn in zip(trainer.rows, (1, 1, 0), strict=True):
        spans = {stage: (start, end) for stage, _, start, end in row["stages"]}
        assert ("ahead" in spans) == drawn
        if drawn:
            assert spans["reward"][1] <= spans["ahead"][0] < spans["ahead"][1]
            assert spans["ahead"][0] < spans["update"][1], "not beside the update"
            assert row["seconds"]["ahead"] > 0


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_a_replay_tells_the_lag_of_the_run_that_saved(lagging, policy_folder, tmp_path, rate):
    """And how far apart its engine and trainer were, also where the replay's weights drift."""
    trainer, _, _ = lagging
    runner = Given(flat(REWARDS))
    runner.composition = Composition({"given": RewardSpec("given")})
    changes = CHANGES | {"train.learning_rate": rate}
    replayed = build(Policy.from_pretrained(policy_folder), tmp_path, runner=runner, **changes)
    replayed.replay = trainer.save_to
    keep_rows(replayed)
    replayed.train()
    assert [row["policy_lag"] for row in replayed.rows] == [0, 1, 1]
    for key in ("grad_norm", "logprob_mismatch_max", "importance_ratio_mean"):
        same = [row[key] for row in replayed.rows] == [row[key] for row in trainer.rows]
        assert same == (key != "grad_norm" or rate == CHANGES["train.learning_rate"])
    engine = [alarms(rows, []).get("engine") for rows in (replayed.rows, trainer.rows)]
    assert engine[0] == engine[1]


def test_what_workers_draw_ahead_after_the_update_is_in_the_row():
    shown = JournalCallback(None, SilentProgress(), [], [])
    shown._busy += [Interval("rollout 0", 0, 1, 2), Interval("rollout 0", 0, 5, 8)]
    shown._busy += [Interval("rollout 0", 0, 9, 10)]  # held-out evaluation
    shown._started, shown._ended = 0.0, 4.0
    ahead = SimpleNamespace(intervals=lambda: [Interval("ahead", 0, 3, 8)])
    shown.trainer = SimpleNamespace(timeline=Timeline(), ahead=ahead)
    assert shown._times()["workers"] == [["rollout 0", 1, 2], ["rollout 0", 5, 8]]


# --- the engine ----------------------------------------------------------------------------------


@pytest.fixture
def requests(policy) -> list[Request]:
    ids = policy.prompt_ids(PROMPTS)
    sampling = Sampling(TEMPERATURE, 20)
    return [
        Request(ids[:2], 2, sampling, [1, 2, 3, 4]),
        Request(ids[2:], 2, sampling, [5, 6]),
    ]


def ask(engine, request: Request):
    return engine.generate(request.prompt_ids, request.n, request.sampling, request.seeds)


def test_other_requests_are_not_answered_with_what_was_drawn_ahead(policy, requests):
    engine = AheadEngine(Watched(policy))
    engine.draw_ahead(requests[:1])
    other = ask(engine, requests[1])
    assert torch.equal(other.completion_ids, ask(engine_of(policy), requests[1]).completion_ids)
    engine.close()


def test_probes_come_after_what_is_being_drawn_and_take_nothing_from_it(policy, requests):
    watched = Watched(policy)
    engine = AheadEngine(watched)
    engine.draw_ahead(requests)
    [probes] = engine.probe(requests[0].prompt_ids, 2).values()
    assert probes.completion_ids.shape == (2, 2)
    ask(engine, requests[1])
    assert watched.calls == ["generate", "generate", "probe"]
    engine.close()


def test_a_resumed_run_goes_on_with_what_was_drawn_before(policy, requests, tmp_path):
    drawn = AheadEngine(Watched(policy))
    drawn.load_weights(merged_tensors(policy.ar), 4)
    drawn.draw_ahead(requests)
    drawn.save(tmp_path)
    expected = [ask(drawn, request) for request in requests]
    drawn.close()
    watched = Watched(policy)
    resumed = AheadEngine(watched)
    resumed.restore(tmp_path)
    resumed.load_weights(merged_tensors(policy.ar), 5)
    for request, batch in zip(requests, expected, strict=True):
        found = ask(resumed, request)
        assert found.prompt_ids == batch.prompt_ids
        assert torch.equal(found.completion_ids, batch.completion_ids)
        assert torch.equal(found.behaviour_logprobs, batch.behaviour_logprobs)
    assert resumed.sampled_from == 4
    assert watched.calls == ["load 5"]
    ask(resumed, replace(requests[0], seeds=[9, 9, 9, 9]))
    assert resumed.sampled_from == 5
    resumed.close()


def test_what_fails_ahead_is_raised_before_new_weights_are_loaded(policy, requests):
    engine = AheadEngine(Watched(policy))
    engine.draw_ahead([Request([[10**6]], 1, Sampling(), [0])])
    with pytest.raises(IndexError):
        engine.load_weights([], 1)
    engine.close()


def test_closing_waits_for_no_draw(policy, requests):
    class Slow(Watched):
        def __init__(self, policy) -> None:
            super().__init__(policy)
            self.begun, self.closed = Event(), Event()

        def generate(self, *asked):
            self.begun.set()
            self.calls.append("ended" if self.closed.wait(60) else "waited")
            raise RunError("closed")

        def close(self):
            self.closed.set()

    engine = AheadEngine(slow := Slow(policy))
    engine.draw_ahead(requests)
    assert slow.begun.wait(60)  # a draw that has not begun is dropped
    engine.close()
    assert slow.calls == ["ended"]


# --- the recipe and the alarms -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["rollout.workers=0"], "set rollout.workers"),
        (["rollout.workers=2", "algorithm.importance_cap=null"], "set algorithm.importance_cap"),
    ],
)
def test_a_lag_needs_workers_and_the_correction(overrides, fix):
    with pytest.raises(RecipeError, match=fix):
        load_recipe("geneval-scenes", ["rollout.max_policy_lag=1", *overrides])


def test_a_lag_is_no_alarm():
    row = {"step": 3, "reward": 0.5, "logprob_mismatch_max": 1.2, "importance_ratio_mean": 1.01}
    assert "engine" in alarms([row], [])
    assert "engine" not in alarms([row | {"policy_lag": 1}], [])
    assert "engine" in alarms([row | {"policy_lag": 1, "importance_ratio_mean": 1.3}], [])
    assert "engine" not in alarms([row | {"logprob_mismatch_max": 1.2}], [], rounded=True)
    assert "engine" in alarms([row | {"logprob_mismatch_max": 10}], [], rounded=True)
