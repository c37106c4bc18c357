"""Pretraining, fine-tuning and editing from recipe to policy: data, freezing, options, resume."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folder import encoded, numbered, png, write_scenes, write_tar
from PIL import Image
from safetensors.torch import load_file

import rl.corpus
from cli.main import main
from common.errors import DataError, Interrupted, RecipeError
from common.journal import read_journal
from common.lock import folder_lock
from data.packing import pack
from evals.policy_hash import policy_hash
from policy import Policy, published
from policy.pixels import to_pixels
from policy.sampling import left_pad
from recipes import load_recipe, shipped_recipes
from rl.build import build, resume
from rl.corpus import BatchEncoder, Collator
from rl.joint_loss import JointLoss
from rl.start_policy import prepare_policy, teach_editing

RECIPE = """
version: 1
kind: pretrain
name: short
seed: 3
policy: {{path: {policy}, device: cpu}}
data: {{source: "{source}"}}
train: {{steps: 4, batch_size: 4, learning_rate: 1e-2}}
save: {{every: 2, keep_last: 9}}
log: {{every: 1}}
"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(rl.corpus, "_CHUNK", 16)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Three shards of ten scenes, packed by our own tool."""
    folder = tmp_path_factory.mktemp("shards")
    pack(write_scenes(folder / "scenes", 30), folder / "packed", per_shard=10)
    return folder / "packed"


@pytest.fixture
def run(tmp_path, policy_folder, shards):
    """Build the short recipe with overrides, in the folder of that name."""

    def run(name: str = "run", *overrides: str, source: object = shards) -> Path:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(RECIPE.format(policy=policy_folder, source=source))
        build(load_recipe(recipe, overrides), tmp_path / name)
        return tmp_path / name

    return run


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return Policy.from_pretrained(run_dir / "policy").state_dict()


def moved(policy_folder: Path, run_dir: Path) -> set[str]:
    before, after = Policy.from_pretrained(policy_folder).state_dict(), weights(run_dir)
    return {
        name for name in after if name not in before or not torch.equal(before[name], after[name])
    }


def assert_same(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# --- what is trained, and on what --------------------------------------------------------


def test_by_default_the_published_parts_are_trained(run, policy_folder):
    changed = moved(policy_folder, run())
    assert {name.split(".")[0] for name in changed} == {"ar", "connector", "diffusion"}
    head = {name for name in changed if name.startswith("diffusion.")}
    assert head
    assert all("caption" in name for name in head)
    every = {n for n in Policy.from_pretrained(policy_folder).state_dict() if "diffusion." in n}
    assert {n for n in every if "caption" in n and "weight" in n} <= head
    assert {"ar.lm_head.weight", "ar.model.embed_tokens.weight"} <= changed


def test_both_losses_are_logged_apart_and_add_up(run):
    rows = [r for r in read_journal(run() / "metrics.jsonl") if "loss" in r]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + row["flow_matching"], rel=1e-5)
        assert row["cross_entropy"] > 0 < row["flow_matching"]


def test_the_plan_counts_the_rows_that_a_run_writes(run, policy_folder, capsys):
    options = ("train.steps=5", "log.every=2")
    rows = read_journal(run("run", *options) / "metrics.jsonl")
    capsys.readouterr()
    assert main(["plan", "tiny/pretrain", f"policy.path={policy_folder}", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["metrics_rows"] == len(rows) == 3


def test_a_resumed_run_holds_its_folder_before_it_chooses_a_checkpoint(run, capsys):
    folder = run()
    (folder / "policy").rename(folder / "gone")
    (folder / "checkpoints" / "step-000004" / "model.safetensors").write_bytes(b"half written")
    with folder_lock(folder):
        capsys.readouterr()
        assert main(["resume", str(folder)]) == 2
    told = capsys.readouterr().err
    assert "another process is writing" in told
    assert "passed over" not in told


def test_loader_workers_and_passes_change_nothing(run):
    plain = run("plain")
    assert_same(plain, run("workers", "data.workers=2"))
    passes = run("passes", "train.micro_batch=2", "log.every=4")
    [row, *_] = [r for r in read_journal(passes / "metrics.jsonl") if "loss" in r]
    rows = [r for r in read_journal(plain / "metrics.jsonl") if "loss" in r]
    for name in ("loss", "cross_entropy", "flow_matching"):
        assert row[name] == pytest.approx(sum(r[name] for r in rows) / 4, abs=1e-4)


def test_adapters_are_merged_and_leave_the_rest_alone(run, policy_folder):
    changed = moved(policy_folder, run("lora", "policy.lora={rank: 2, targets: [q_proj]}"))
    language = {name for name in changed if name.startswith("ar.")}
    assert language
    assert all("q_proj.weight" in name for name in language)


def test_a_compiled_model_gives_the_same_losses_whatever_the_captions_length(run, monkeypatch):
    """Traced as in a real run; translating the trace into C++ would take minutes."""
    real = torch.nn.Module.compile
    options: list[dict] = []

    def traced(module, **asked):
        options.append(asked)
        real(module, backend="eager", **asked)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    rows = {}
    for name in ("true", "false"):
        changes = ("train.gradient_checkpointing=true", "train.learning_rate=1e-3")
        folder = run(name, f"train.compile={name}", *changes)
        rows[name] = [r["loss"] for r in read_journal(folder / "metrics.jsonl") if "loss" in r]
    assert rows["true"] == pytest.approx(rows["false"], abs=1e-4)
    assert options == [{"dynamic": True}]


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_an_option_that_saves_memory_gives_nearly_the_same_losses(run, option):
    rows = {}
    for name, value in (("on", "true"), ("off", "false")):
        folder = run(name, f"train.{option}={value}", "train.learning_rate=1e-3")
        rows[name] = [r["loss"] for r in read_journal(folder / "metrics.jsonl") if "loss" in r]
    tolerance = 0.1 if option == "bf16" else 1e-4
    assert rows["on"] == pytest.approx(rows["off"], abs=tolerance)
    assert (rows["on"] != rows["off"]) == (option == "bf16")


def test_the_moving_average_is_what_the_policy_has(run, policy_folder):
    """By hand from the weights after each step, which the checkpoints hold."""
    folder = run("ema", "train.ema=0.8", "save.every=1")
    name = "ar.model.embed_tokens.weight"
    average = Policy.from_pretrained(policy_folder).state_dict()[name]
    for step in range(1, 5):
        weight = load_file(folder / "checkpoints" / f"step-00000{step}" / "model.safetensors")[name]
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(weights(folder)[name], average)
    assert not torch.equal(weights(folder)[name], weight)


# --- resume ------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), ("train.ema=0.9", "policy.lora={rank: 2}")])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not(run, monkeypatch, extra):
    whole = run("whole", "train.steps=6", *extra)
    real, calls = rl.pretrain.JointTrainer.compute_loss, []

    def stop_in_step_three(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(rl.pretrain.JointTrainer, "compute_loss", stop_in_step_three)
    with pytest.raises(Interrupted, match="stopped after step 3"):
        run("halved", "train.steps=6", *extra)
    halved = whole.parent / "halved"
    assert not (halved / "policy").exists()
    assert main(["resume", str(halved)]) == 0
    assert len(calls) == 6
    assert_same(whole, halved)
    rows = [
        [
            {k: r[k] for k in ("step", "loss")}
            for r in read_journal(f / "metrics.jsonl")
            if "loss" in r
        ]
        for f in (whole, halved)
    ]
    assert rows[0] == rows[1]


def test_a_resumed_run_refuses_shards_that_have_changed(run, tmp_path):
    path = write_tar(tmp_path / "s" / "a.tar", numbered(30))
    folder = run(source=path)
    (folder / "policy").rename(folder / "gone")
    write_tar(path, numbered(60))
    with pytest.raises(Exception, match=r"a\.tar is missing or has changed"):
        resume(folder)


# --- bad data ----------------------------------------------------------------------------


def test_a_bad_sample_is_skipped_counted_and_logged(run, tmp_path):
    # 1 of 400: fewer than 1 %, whichever order they come in. Four steps read a whole epoch.
    members = [*numbered(200), ("bad.png", png()[:50]), ("bad.txt", b"x")]
    members += [(f"m{name}", data) for name, data in numbered(199)]
    source = write_tar(tmp_path / "s" / "a.tar", members)
    folder = run("run", "train.batch_size=100", "policy.lora={rank: 1}", source=source)
    rows = read_journal(folder / "metrics.jsonl")
    [event] = [row for row in rows if row.get("event") == "skipped"]
    assert event["sample"].startswith("a.tar: bad: ")
    assert max(row.get("skipped", 0) for row in rows) == 1


def test_a_bad_sample_counts_once_however_often_it_is_read(run, tmp_path):
    """1 of 101 is let pass in the second epoch, too."""
    source = write_tar(
        tmp_path / "s" / "a.tar", [*numbered(100), ("bad.png", b"x"), ("bad.txt", b"x")]
    )
    options = ("train.steps=10", "train.batch_size=20", "policy.lora={rank: 1}")
    folder = run("run", *options, source=source)
    rows = read_journal(folder / "metrics.jsonl")
    assert sum(row.get("event") == "skipped" for row in rows) >= 2
    assert max(row.get("skipped", 0) for row in rows) == 1


def test_too_many_bad_samples_stop_the_run(run, tmp_path):
    members = [m for n in range(20) for m in ((f"b{n}.png", b"x"), (f"b{n}.txt", b"x"))]
    source = write_tar(tmp_path / "s" / "a.tar", [*numbered(180), *members])
    with pytest.raises(DataError, match=r"samples read so far are bad, more than 1%") as caught:
        run("run", "train.steps=50", source=source)
    assert "Fix:" in str(caught.value)
    rows = read_journal(tmp_path / "run" / "metrics.jsonl")
    assert sum(row.get("event") == "skipped" for row in rows) >= 3


def test_torn_and_unreadable_samples_are_judged_together(run, tmp_path):
    """2 torn of 252 are let pass, so is 1 unreadable of 250, and both are more than 1 %."""
    torn = [("t1.png", png()), ("t2.png", png())]
    bad = [("bad.png", b"x"), ("bad.txt", b"x")]
    whole = numbered(249)
    options = ("train.steps=3", "train.batch_size=100", "policy.lora={rank: 1}", "log.every=3")
    for name, extra in (("torn", [*numbered(1, 249), *torn]), ("bad", bad)):
        run(name, *options, source=write_tar(tmp_path / name / "a.tar", [*whole, *extra]))
    both = write_tar(tmp_path / "both" / "a.tar", [*whole, *bad, *torn])
    with pytest.raises(DataError, match=r"0\.8% of all are not whole: together more than 1%"):
        run("both-run", *options, source=both)


def test_shards_with_too_many_torn_samples_are_refused_and_leave_no_run(run, tmp_path):
    members = [*numbered(20), ("a.png", png()), ("b.png", png())]
    with pytest.raises(DataError, match=r"(?s)2 of the 22 samples.*a: no caption") as caught:
        run(source=write_tar(tmp_path / "s" / "a.tar", members))
    assert "Fix:" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named_and_leaves_no_run(tmp_path, policy_folder, capsys):
    source = f"data.source={tmp_path}/x-{{000..003}}.tar"
    run_dir = tmp_path / "run"
    start = ["train", "tiny/pretrain", source, f"policy.path={policy_folder}"]
    assert main([*start, "--out", str(run_dir)]) == 1
    assert "x-000.tar: no such shard (4 of 4" in capsys.readouterr().err
    assert not run_dir.exists()


def test_a_caption_longer_than_the_context_is_cut_at_its_end(policy):
    encoder = BatchEncoder(policy, Collator(policy), context=36 + 20, with_latents=False)
    long = "a photo of a red circle and a blue square " * 5
    short, cut = encoder.prompts(["a red ring", long])
    assert [short] == policy.prompt_ids(["a red ring"])
    assert encoder.cut == 1
    [full] = policy.prompt_ids([long])
    assert 16 <= len(cut) <= 20
    # The text is a beginning of the caption; its last word may be cut, and then has other tokens.
    kept, whole = (policy.tokenizer.decode(ids[:-3]) for ids in (cut, full))
    assert whole.startswith(kept)
    assert "a photo of a red" in kept
    assert cut[-3:] == full[-3:]


def test_cut_captions_are_counted_in_the_log(run, tmp_path):
    members = [("a.png", png()), ("a.txt", b"word " * 900)]
    folder = run(source=write_tar(tmp_path / "s" / "a.tar", members))
    assert read_journal(folder / "metrics.jsonl")[-1]["captions_cut"] == 16


def test_a_context_without_room_for_any_caption_is_refused(run):
    with pytest.raises(RecipeError, match=r"data\.context is 40"):
        run("run", "data.context=40")


# --- edits -------------------------------------------------------------------------------


EDIT = (
    "data.references=1",
    "trainable=[ar, connector, reference_connector, diffusion.caption, diffusion.patch]",
    "policy.routes=[cross_attention, noise_space]",
)


def test_a_policy_learns_to_take_a_reference(run, policy_folder):
    folder = run("edit", *EDIT, source="scenes")
    policy = Policy.from_pretrained(folder / "policy")
    assert policy.config.routes == ("cross_attention", "noise_space")
    assert "<image>" in policy.prompt_text("make the circle red", references=1)
    changed = moved(policy_folder, folder)
    assert any(name.startswith("reference_connector.") for name in changed)
    head = {name.split(".")[1] for name in changed if name.startswith("diffusion.")}
    assert {"patch_embed", "proj_out"} <= head
    assert not any("transformer_blocks" in name for name in changed)
    pixels = torch.zeros(1, 3, 48, 48)
    one, other = (
        policy.generate(["add a red ring"], references=p, seed=0) for p in (pixels, pixels + 1)
    )
    assert one[0].tobytes() != other[0].tobytes()
    with pytest.raises(RecipeError, match="routes"):
        load_recipe(folder / "recipe.yaml", ["data.references=0"])


def test_a_published_policy_is_taught_the_published_template(policy):
    """As conversion writes it: vision tags that the tokenizer lacks would be read as text."""
    policy.config = replace(policy.config, prompt_template=published.PROMPT_TEMPLATE)
    teach_editing(policy, ("noise_space",), seed=0)
    assert not set(policy.tokenizer.get_vocab()) & {"<|vision_start|>", "<|vision_end|>"}
    untagged = published.EDIT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    assert policy.config.edit_template == untagged
    assert policy.reference_connector is None
    policy.tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>"])
    policy.config = replace(policy.config, edit_template=None)
    teach_editing(policy, ("noise_space",), seed=0)
    assert policy.config.edit_template == published.EDIT_TEMPLATE


def test_what_the_loss_sees_of_an_edit(policy_folder):
    """Codes of the reference in the prompt, codes and latents of the target, latents of both."""
    recipe = load_recipe("tiny/edit", [f"policy.path={policy_folder}"]).recipe
    policy, _ = prepare_policy(recipe)
    collator = Collator(policy)
    encoder = BatchEncoder(policy, collator, context=512, with_latents=True)
    drawn = torch.Generator().manual_seed(0)
    target, reference = torch.randint(
        256, (2, 2, 48, 48, 3), dtype=torch.uint8, generator=drawn
    ).unbind()
    captions = ["make the circle red", "remove the square"]
    batch = encoder(
        {"pixels": target, "reference": reference, "captions": captions, "seeds": [1, 2]}
    )
    scaled = [p.permute(0, 3, 1, 2) / 127.5 - 1 for p in (target, reference)]
    codes = [policy.encode_images(pixels) for pixels in scaled]
    prompts = policy.prompt_ids(captions, codes[1][:, None])
    ids, mask = left_pad(prompts, policy.config.pad_id)
    assert torch.equal(batch["input_ids"][:, : ids.shape[1]], ids)
    assert torch.equal(batch["attention_mask"][:, : ids.shape[1]], mask)
    assert torch.equal(batch["input_ids"][:, -36:] - policy.config.image_start_id, codes[0])
    torch.testing.assert_close(batch["latents"], policy.encode_latents(scaled[0]))
    torch.testing.assert_close(batch["reference_latents"], policy.encode_latents(scaled[1]))
    # Teaching what is known already changes nothing.
    first = policy.reference_connector.state_dict()
    again, _ = prepare_policy(recipe)
    assert all(torch.equal(first[k], v) for k, v in again.reference_connector.state_dict().items())


@pytest.mark.parametrize("switched", [False, True])
def test_a_policy_of_squashed_tokens_is_trained_on_the_tokens_of_whole_pictures(
    switched, policy_folder, tmp_path, run, monkeypatch
):
    """The codes that the loss gets; the switch `tail_slice` is on as well, as in released ones."""
    policy = Policy.from_pretrained(policy_folder)
    switches = ("squashed_tokens", "tail_slice") if switched else ()
    policy.config = replace(policy.config, compatibility=switches)
    policy.save_pretrained(tmp_path / "policy")
    noise = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    wide = Image.fromarray(noise)
    source = write_tar(tmp_path / "s" / "a.tar", [("a.png", encoded(wide)), ("a.txt", b"a ring")])
    seen, real = {}, JointLoss.forward

    def note(joint, **batch):
        seen.update(batch)
        return real(joint, **batch)

    monkeypatch.setattr(JointLoss, "forward", note)
    run("run", f"policy.path={tmp_path / 'policy'}", "train.steps=1", source=source)
    ids = seen["input_ids"][0]
    codes = ids[policy.image_places(ids[None])[0, 1:]] - policy.config.image_start_id
    centre = wide.crop((24, 0, 72, 48))
    shown = wide.resize((48, 48), Image.Resampling.BILINEAR) if switched else centre
    assert torch.equal(codes, policy.encode_images(to_pixels(shown)[None])[0])
    latents = policy.encode_latents(to_pixels(centre)[None])
    torch.testing.assert_close(seen["latents"][:1], latents)
    other = policy.encode_images(to_pixels(centre)[None])[0]
    assert torch.equal(codes, other) != switched
    assert (int(ids[-1]) == policy.config.image_start_id + int(codes[-1])) != switched


# --- the shipped recipes -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain", "sft", "edit"])
def test_the_tiny_recipes_run_one_after_the_other(name, policy_folder, tmp_path):
    overrides = ["train.steps=2", "train.batch_size=4", f"policy.path={policy_folder}"]
    assert main(["train", f"tiny/{name}", *overrides, "--out", str(tmp_path / "run")]) == 0
    facts = json.loads((tmp_path / "run" / "policy" / "policy.json").read_text())
    [stage] = facts["provenance"]["stages"]
    start = policy_hash(Policy.from_pretrained(policy_folder))
    assert stage == {
        "recipe": f"tiny-{name}", "kind": "pretrain", "steps": 2, "seed": 0, "start": start,
    }  # fmt: skip


def test_a_trained_policy_tells_of_all_that_it_came_from(run, policy, tmp_path):
    before = {"converted_from": "BLIP3o-NEXT", "stages": [{"recipe": "earlier"}]}
    policy.config = replace(policy.config, provenance=before)
    policy.save_pretrained(tmp_path / "policy")
    folder = run("run", f"policy.path={tmp_path / 'policy'}", "train.steps=1")
    told = Policy.from_pretrained(folder / "policy").config.provenance
    assert told["converted_from"] == "BLIP3o-NEXT"
    assert [stage["recipe"] for stage in told["stages"]] == ["earlier", "short"]
    assert told["stages"][1]["start"] == policy_hash(policy)


@pytest.mark.parametrize("name", ["pretrain", "sft", "edit"])
def test_the_twins_train_alike(name):
    assert f"blip3o-next-3b/{name}" in shipped_recipes()
    small, large = (load_recipe(f"{folder}/{name}").recipe for folder in ("tiny", "blip3o-next-3b"))
    assert small.loss == large.loss
    assert small.trainable == large.trainable
    assert small.data.references == large.data.references
    assert small.policy.routes == large.policy.routes
    assert large.train.bf16
    assert large.train.deepspeed


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.micro_batch=3", "train.micro_batch"),
        ("loss={cross_entropy: 0, flow_matching: 0}", "loss.cross_entropy"),
        ("loss.flow_matching=0", "trainable"),
        ("policy.routes=[noise_space]", "policy.routes"),
        ("data.source=x.tar data.tasks={colors: 1}", "data.tasks"),
        ("data.workers=2", "data.workers"),
        ("data.context=512", "data.context"),
        ("data.tasks={colors: 0}", "data.tasks"),
        ("data.source=x.tar loss.draws=per_batch", "loss.draws"),
        ("data.references=1 loss.draws=per_batch", "loss.draws"),
        ("trainable=[connector] policy.lora={rank: 2}", "policy.lora"),
        ("train.deepspeed=zero2 train.optimizer=muon", "train.optimizer"),
        ("train.deepspeed=zero3 train.ema=0.9", "train.ema"),
        ("trainable=[vae]", "trainable.0"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_its_key(override, key):
    overrides = re.split(r" (?=[a-z]+\.)", override)
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny/pretrain", overrides)
    assert key in [problem.key for problem in caught.value.problems]
