"""DDP and DeepSpeed's ZeRO with two real processes: the same losses, the same pictures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from picture_folder import write_edits, write_scenes
from safetensors.torch import load_file
from tiny_policy import write_recipe

from common.journal import read_journal
from data.packing import pack
from policy import Policy
from recipes import load_recipe
from rl.build import build
from rl.start_policy import export_policy

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
LORA = "policy.lora={rank: 4}"
BF16_EDIT = (
    "data.references=1;policy.routes=[cross_attention, noise_space];"
    "trainable=[ar, connector, reference_connector, diffusion.caption, diffusion.patch];"
    "train.steps=4;train.bf16=true;log.every=2"
)
CURVES = {
    "two": "",
    "zero1": "train.deepspeed=zero1",
    "zero2": "train.deepspeed=zero2",
    "zero3": "train.deepspeed=zero3",
    "zero2-lora": f"train.deepspeed=zero2;{LORA}",
    "zero3-lora": f"train.deepspeed=zero3;{LORA}",
    "resumed-zero2": "",
    "resumed-zero3": "",
}
FULL = "train.steps=3;policy.lora=null;train.learning_rate=1e-4;algorithm.beta=0.01"
GRPO = {
    "grpo-two": FULL,
    "grpo-zero1": f"{FULL};train.deepspeed=zero1",
    "grpo-zero2": f"{FULL};train.deepspeed=zero2",
    "grpo-two-lora": "train.steps=3",
    "grpo-zero2-lora": "train.steps=3;train.deepspeed=zero2;evals.every=3;evals.limit=2",
    "grpo-zero2-bf16": "train.steps=2;train.deepspeed=zero2;policy.dtype=bfloat16",
    "resumed-grpo-zero2": "",
    "grpo-uneven": f"train.steps=1;rewards.functions=[{{use: '{ROOT}/tests/uneven.py:uneven'}}]",
}
RECIPE = """
version: 1
kind: pretrain
name: curve
seed: 3
policy: {{path: {policy}, device: cpu}}
data: {{source: {shards}}}
train: {{steps: 20, batch_size: 8, learning_rate: 1e-3, warmup_steps: 4, decay_steps: 8}}
save: {{every: 10, keep_last: 2}}
log: {{every: 1}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path) -> Path:
    """All runs, the single ones in this process and the others in one launch of two."""
    folder = tmp_path_factory.mktemp("zero")
    pack(write_scenes(folder / "scenes", 90), folder / "shards", per_shard=40)
    pack(write_edits(folder / "edits", 12), folder / "triples")
    edits = f"data.source={folder / 'triples'};{BF16_EDIT}"
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(policy=policy_folder, shards=folder / "shards"))
    for name, overrides in (("one", []), ("one-lora", [LORA]), ("one-edit", edits.split(";"))):
        build(load_recipe(recipe, overrides), folder / name)
    grpo = write_recipe(folder / "grpo", policy_folder)
    reinforced = {f"{name}@{grpo}": overrides for name, overrides in GRPO.items()}
    runs = {**CURVES, **reinforced, "zero2-edit": f"train.deepspeed=zero2;data.workers=1;{edits}"}
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(ROOT / "tests" / "zero_worker.py"), str(recipe), str(folder),
            *(f"{name}:{overrides}" for name, overrides in runs.items()),
        ],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def losses(run_dir: Path) -> list[float]:
    rows = [row for row in read_journal(run_dir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def single(name: str) -> str:
    return "one-lora" if name.endswith("lora") else "one"


@pytest.mark.parametrize("name", CURVES)
def test_the_losses_are_those_of_one_process(runs: Path, name: str) -> None:
    curve = losses(runs / single(name))
    assert losses(runs / name) == pytest.approx(curve, abs=1e-5)
    assert curve[-1] < curve[0] - 2  # much was learnt, so there was much to disagree about


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_resumed_run_gives_the_policy_of_the_whole_one(runs: Path, name: str) -> None:
    whole, resumed = (
        Policy.from_pretrained(runs / run / "policy").state_dict()
        for run in (name, f"resumed-{name}")
    )
    assert losses(runs / f"resumed-{name}") == losses(runs / name)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_adapters_learn_something_else_than_all_weights(runs: Path) -> None:
    assert (
        max(
            abs(a - b) for a, b in zip(losses(runs / "one"), losses(runs / "one-lora"), strict=True)
        )
        > 0.1
    )


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3-lora"])
def test_the_policy_renders_the_pictures_of_the_single_process(runs: Path, name: str) -> None:
    prompts = ["a photo of a red circle", "a photo of two squares", 'a sign that says "CAB"']
    policies = [Policy.from_pretrained(runs / run / "policy") for run in (single(name), name)]
    # The tokens are drawn once: two samplers of nearly equal weights may fall to either side.
    ids = policies[0].prompt_ids(prompts)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(64, (3, 36), generator=generator) + policies[0].config.image_start_id
    pictures = [p.render(p.condition_rows(ids, codes), seed=1) for p in policies]
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-3, rtol=0)
    untrained = Policy.from_pretrained(load_recipe(runs / "recipe.yaml").recipe.policy.path)
    before = untrained.render(untrained.condition_rows(ids, codes), seed=1)
    assert float((before - pictures[0]).abs().max()) > 0.05


def test_edits_from_shards_train_in_bf16_on_two_processes(runs: Path) -> None:
    one, two = (
        [r for r in read_journal(runs / name / "metrics.jsonl") if "loss" in r]
        for name in ("one-edit", "zero2-edit")
    )
    for name in ("cross_entropy", "flow_matching"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=0.05)
    # Each caption is cut once an epoch, whichever process reads it.
    assert [r["captions_cut"] for r in one] == [r["captions_cut"] for r in two]
    assert two[-1]["captions_cut"] > 1
    policy = Policy.from_pretrained(runs / "zero2-edit" / "policy")
    assert policy.config.routes == ("cross_attention", "noise_space")
    pictures = [
        policy.generate(["make the circle red"], references=pixels, seed=0)[0].tobytes()
        for pixels in (torch.zeros(1, 3, 48, 48), torch.ones(1, 3, 48, 48))
    ]
    assert pictures[0] != pictures[1]


def grpo_rows(run_dir: Path) -> list[dict]:
    return [row for row in read_journal(run_dir / "metrics.jsonl") if "reward" in row]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("grpo-zero1", "grpo-two"),
        ("grpo-zero2", "grpo-two"),
        ("resumed-grpo-zero2", "grpo-two"),
        ("grpo-zero2-lora", "grpo-two-lora"),
    ],
)
def test_grpo_has_the_metrics_of_two_plain_processes(runs: Path, name: str, plain: str) -> None:
    found, expected = grpo_rows(runs / name), grpo_rows(runs / plain)
    assert [row["step"] for row in found] == [1, 2, 3]
    metrics = ["reward", "reward_std", "entropy", "loss", "grad_norm", "lr"]
    metrics += ["kl"] if plain == "grpo-two" else []
    for metric in metrics:
        values = [row[metric] for row in expected]
        assert [row[metric] for row in found] == pytest.approx(values, rel=1e-5, abs=1e-5), metric
    one, other, start = (
        Policy.from_pretrained(place).state_dict()
        for place in (
            runs / name / "policy",
            runs / plain / "policy",
            load_recipe(runs / "recipe.yaml").recipe.policy.path,
        )
    )
    moved = [key for key, tensor in one.items() if not torch.equal(tensor, start[key])]
    assert moved
    far = max(float((one[key] - start[key]).abs().max()) for key in moved)
    apart = torch.cat([(one[key] - other[key]).flatten().abs() for key in moved])
    # AdamW's first steps are signs: a few gradients near zero may flip.
    assert float(apart.mean()) < 0.01 * far


def test_processes_with_other_numbers_of_informative_groups_learn_together(runs: Path) -> None:
    [row] = grpo_rows(runs / "grpo-uneven")
    groups = load_recipe(str(runs / "grpo-uneven" / "recipe.yaml")).recipe.rollout.prompts_per_step
    assert row["zero_variance_groups"] == groups / 2
    assert row["grad_norm"] > 0


def test_what_happens_in_other_processes_is_journaled(runs: Path) -> None:
    """The second process found no memory for its pictures, once."""
    journal = read_journal(runs / "grpo-uneven" / "metrics.jsonl")
    [event] = [row for row in journal if row.get("event") == "micro_batch_halved"]
    assert (event["stage"], event["process"], event["step"]) == ("render", 1, 1)


def test_grpo_under_zero_evaluates_once_and_trains_bfloat16_weights(runs: Path) -> None:
    journal = read_journal(runs / "grpo-zero2-lora" / "metrics.jsonl")
    assert [row["step"] for row in journal if row.get("event") == "eval"] == [0, 3]
    rows = grpo_rows(runs / "grpo-zero2-bf16")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["grad_norm"] > 0 and row["logprob_mismatch_max"] < 0.5 for row in rows)
    trained = Policy.from_pretrained(runs / "grpo-zero2-bf16" / "policy", torch.bfloat16)
    start = Policy.from_pretrained(load_recipe(runs / "recipe.yaml").recipe.policy.path)
    before = start.to(torch.bfloat16).ar.state_dict()
    assert any(not torch.equal(before[k], t) for k, t in trained.ar.state_dict().items())


def test_zero3_divides_the_weights_and_a_checkpoint_still_holds_them_whole(runs: Path) -> None:
    checkpoint = runs / "zero3" / "checkpoints" / "step-000020"
    shards = sorted(checkpoint.rglob("zero_pp_rank_*_model_states.pt"))
    assert len(shards) == 2  # one for each process: the weights were divided
    whole = load_file(checkpoint / "model.safetensors")
    trained = Policy.from_pretrained(runs / "zero3" / "policy").state_dict()
    assert len(whole) > 10
    assert all(torch.equal(trained[name], tensor) for name, tensor in whole.items())


def test_a_zero3_checkpoint_from_the_middle_becomes_a_policy(runs: Path, tmp_path: Path) -> None:
    recipe = load_recipe(runs / "zero3" / "recipe.yaml").recipe
    policies = []
    for name in ("zero3", "one"):
        export_policy(recipe, runs / name / "checkpoints" / "step-000010", tmp_path / name)
        policies.append(Policy.from_pretrained(tmp_path / name))
    images = [policy.generate(["a photo of a red circle"], seed=5) for policy in policies]
    final = Policy.from_pretrained(runs / "one" / "policy").generate(
        ["a photo of a red circle"], seed=5
    )
    assert images[0][0].tobytes() == images[1][0].tobytes()
    assert images[0][0].tobytes() != final[0].tobytes()
