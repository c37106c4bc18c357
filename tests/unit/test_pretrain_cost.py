"""What `atelier plan` says of pretraining, compared with torch's own counters and with the parts
that a run really trains."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cli import machine
from cli.main import main
from cli.plan_parts import gigabytes, table_line
from policy import base_path
from policy.anatomy import read_anatomy
from policy.published import SANA, published_anatomy, published_modules
from recipes import load_recipe
from rl import flops, memory
from rl.corpus import BatchEncoder, Collator
from rl.joint_loss import JointLoss
from rl.memory import Sharding
from rl.pretrain_cost import (
    _kept,
    as_trained,
    checkpoint_bytes,
    pretrain_flops,
    pretrain_memory,
    trained_values,
)
from rl.start_policy import prepare_policy

PICTURES = 2
EDIT = "tiny/edit"
CASES = [
    ("tiny/pretrain", []),
    (
        "tiny/pretrain",
        ["trainable=[ar, connector, diffusion]", "train.gradient_checkpointing=true"],
    ),
    ("tiny/pretrain", ["trainable=[connector, diffusion]", "loss.cross_entropy=0"]),
    ("tiny/sft", ["policy.path=base"]),
    (EDIT, []),
]  # fmt: skip


def recipe_of(name, *changes):
    return load_recipe(name, list(changes)).recipe


@pytest.fixture(scope="module")
def base():
    return read_anatomy(base_path())


@pytest.fixture(scope="module")
def published():
    return published_anatomy()


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_trained_values_are_those_with_gradients(name, changes, base):
    recipe = recipe_of(name, "policy.path=base", *changes)
    policy, _ = prepare_policy(recipe)
    anatomy = as_trained(recipe, base)
    found = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(trained_values(recipe, anatomy).values()) == found
    adapters = trained_values(recipe, anatomy)["ar"] if recipe.policy.lora else 0
    held = sum(p.numel() for p in policy.parameters())
    assert sum(anatomy.parameters.values()) + adapters == held


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_operations_of_a_step(name, changes, base):
    """The counter's batch has prompts of one length, which stands for the typical one."""
    recipe = recipe_of(name, "policy.path=base", f"train.batch_size={PICTURES}", *changes)
    policy, _ = prepare_policy(recipe)
    joint = JointLoss(
        policy,
        cross_entropy=recipe.loss.cross_entropy,
        flow_matching=recipe.loss.flow_matching,
    ).train()
    if recipe.train.gradient_checkpointing:
        policy.ar.gradient_checkpointing_enable({"use_reentrant": False})
        policy.diffusion.enable_gradient_checkpointing()
    picture = torch.zeros(PICTURES, 48, 48, 3, dtype=torch.uint8)
    batch = {"pixels": picture, "captions": ["a photo of a red circle"] * PICTURES}
    batch["seeds"] = [0, 1]
    if recipe.data.references:
        batch["reference"] = picture
    encoder = BatchEncoder(policy, Collator(policy), 256, bool(recipe.loss.flow_matching))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        inputs = encoder(batch)
        encoding = counter.get_total_flops()
        joint(**inputs)["loss"].backward()
    training = counter.get_total_flops() - encoding
    tokens = inputs["input_ids"].shape[1] - base.num_tokens * (1 + recipe.data.references)
    sized = replace(as_trained(recipe, base), prompt_tokens=tokens)
    work = pretrain_flops(recipe, sized)
    codecs = work["encode tokens"] + work["encode latents"]
    # Reference and target are encoded in two calls, each with a codebook of its own.
    codebook = 2 * 512 * 16 * 16
    expected = PICTURES * codecs + (codebook if recipe.data.references else 0)
    assert encoding == pytest.approx(expected, rel=1e-6)
    if "diffusion" in recipe.trainable:
        # The counter takes a depth-wise convolution's gradient for that of a dense one.
        conv = base.parts["diffusion"].shapes["transformer_blocks.0.ff.conv_depth.weight"]
        layers = base.parts["diffusion"].config["num_layers"]
        training -= PICTURES * layers * 2 * 36 * conv[0] * 9 * (conv[0] - 1)
    # What the head does before its first cross-attention has no gradient if it is frozen.
    assert training == pytest.approx(PICTURES * (sum(work.values()) - codecs), rel=0.05)


def test_encoders_of_the_published_size(published):
    modules = published_modules()
    with torch.device("meta"), torch.no_grad():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            modules["vae"].encode(torch.zeros(1, 3, 1024, 1024))
        latents = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            modules["image_tokenizer"].encode(torch.zeros(1, 3, 384, 384))
        codes = counter.get_total_flops()
    assert latents == flops.encoder_flops(published.parts["vae"], 32)
    assert codes == flops.tokenizer_flops(published, 1)


def test_parameters_of_the_published_size_by_hand(published):
    """Every matrix of the parts that the edit recipe trains, from the published configurations."""
    recipe = recipe_of("blip3o-next-3b/edit")
    anatomy = as_trained(recipe, published)
    layer = 2048 * (16 + 8 + 8) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128
    width, inner = 2304, 70 * 32

    def connector(rows: int) -> int:
        return rows * width + width + width * width + width + width

    assert trained_values(recipe, anatomy) == {
        "ar": 217_210 * 2048 + 28 * layer + 2048,
        "connector": connector(2048),
        "reference_connector": connector(32),
        "diffusion.caption": width * inner + inner + inner * inner + inner + inner,
        "diffusion.patch": 32 * inner + inner + inner * 32 + 32,
    }


def peak_of(module, run) -> int:
    tracker = MemTracker()
    tracker.track_external(module)
    with tracker, torch.no_grad():
        run()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return snapshot["Total"] - sum(p.nbytes for p in module.parameters())


def test_buffers_of_encoding(published):
    from diffusers import AutoencoderDC
    from torch._subclasses.fake_tensor import FakeTensorMode

    from policy.published import DC_AE

    with FakeTensorMode():
        vae = AutoencoderDC(**DC_AE)
        pixels = torch.zeros(1, 3, 1024, 1024)
        measured = peak_of(vae, lambda: vae.encode(pixels))
    assert memory.autoencoder_buffers(published, 1, 4, "encoder") == pytest.approx(
        measured, rel=0.01
    )


def test_what_the_head_keeps_for_the_backward_pass(published):
    """The published head in bfloat16, by saved-tensor hooks on fake tensors."""
    from diffusers import SanaTransformer2DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            head = SanaTransformer2DModel(**SANA).train().requires_grad_(False)
            latents = torch.zeros(1, 32, 32, 32)
            rows = torch.zeros(1, 730, 2304, requires_grad=True)
            weights = {p.untyped_storage()._cdata for p in head.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = head(latents, rows, timestep=torch.zeros(1))[0]
            measured = sum(size for place, size in kept.items() if place not in weights)
            assert output.requires_grad
    finally:
        torch.set_default_dtype(before)
    recipe = recipe_of(
        "blip3o-next-3b/sft", "trainable=[connector]", "loss.cross_entropy=0",
        "train.gradient_checkpointing=false",
    )  # fmt: skip
    a_block = measured / SANA["num_layers"]
    assert _kept(recipe, published, 2, 2) == pytest.approx(measured + a_block, rel=0.02)


def test_gradients_and_states_are_what_adamw_holds(base):
    recipe = recipe_of("tiny/edit", "policy.path=base", "train.ema=0.9")
    policy, _ = prepare_policy(recipe)
    trained = [p for p in policy.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    found = pretrain_memory(recipe, as_trained(recipe, base), Sharding()).resident
    codecs = [*policy.image_tokenizer.parameters(), *policy.vae.parameters()]
    held = sum(p.nbytes for p in policy.parameters())
    assert found == {
        "weights": held - sum(p.nbytes for p in codecs),
        "weights of the codecs": sum(p.nbytes for p in codecs),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer states": sum(v.nbytes for v in states),
        "moving average": sum(p.nbytes for p in trained),
    }


def test_zero_divides_by_the_table_of_its_paper(published):
    """2 + 2 + 12 bytes for what learns, 2 for what is frozen; stage 3 divides that, too."""
    recipe = recipe_of("blip3o-next-3b/sft")
    learns = sum(trained_values(recipe, published).values())
    codecs = published.parameters["image_tokenizer"] + published.parameters["vae"]
    joint = sum(published.parameters.values()) - codecs
    for stage, bytes_of in (
        (1, 2 * joint + (2 + 12 / 8) * learns),
        (2, 2 * joint + 14 / 8 * learns),
        (3, (2 * joint + 14 * learns) / 8),
    ):
        held = sum(pretrain_memory(recipe, published, Sharding(8, stage)).resident.values())
        assert held - 4 * codecs == pytest.approx(bytes_of, rel=1e-6)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain", "sft", "edit"])
def test_the_large_recipes_have_a_whole_plan(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpus", lambda: None)
    assert main(["plan", f"blip3o-next-3b/{name}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert ("reference_connector" in facts["parameters"]) == (name == "edit")
    assert [row["gpus"] for row in facts["memory"]] == [1, 8, 32]
    peaks = {(o["gpus"], o["zero_stage"]): o["peak"] for o in facts["options"]}
    assert peaks[8, 1] > peaks[8, 2] > peaks[8, 3]
    assert peaks[8, 1] > peaks[32, 1]
    assert main(["plan", f"blip3o-next-3b/{name}"]) == 0
    text = capsys.readouterr().out
    assert "memory of one GPU" in text
    table, files = text.split("\nfiles\n")
    assert all(len(line) <= 80 for line in table.splitlines())
    assert ("32 GPUs need train.micro_batch=3" in table) == (name == "edit")
    assert "about 33." in files


def test_a_part_within_a_trained_part_counts_once(base):
    def trained(parts: str) -> int:
        recipe = recipe_of("tiny/pretrain", "policy.path=base", f"trainable=[{parts}]")
        return sum(trained_values(recipe, base).values())

    assert trained("ar, diffusion, diffusion.caption") == trained("ar, diffusion")
    assert trained("diffusion.caption, diffusion") == trained("diffusion")


def test_a_tied_head_that_is_stored_counts_once(base, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(base_path(), policy)
    config = policy / "ar" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    shapes = base.parts["ar"].shapes
    embedding = math.prod(shapes["model.embed_tokens.weight"])
    assert "lm_head.weight" in shapes
    assert read_anatomy(policy).parts["ar"].parameters == base.parts["ar"].parameters - embedding


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        (["train.batch_size=8"], [[], [], ["train.batch_size=32"]]),
        (["train.batch_size=48"], [[], [], ["train.batch_size=64"]]),
        (["train.batch_size=64", "train.micro_batch=32"],
         [[], ["train.micro_batch=8"], ["train.micro_batch=2"]]),
        (["train.batch_size=96", "train.micro_batch=2"], [[], [], ["train.micro_batch=1"]]),
    ],
)  # fmt: skip
def test_what_so_many_gpus_need_is_said(changes, needs, capsys):
    recipe = ["tiny/pretrain", "policy.path=base", "policy.device=cuda", *changes]
    assert main(["plan", *recipe, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["memory"]
    assert [row["needs"] for row in rows] == needs
    for row in rows:
        overrides = [*recipe[1:], *row["needs"]]
        train = load_recipe("tiny/pretrain", overrides).recipe.train
        micro = train.micro_batch or train.batch_size // row["gpus"]
        assert micro == row["micro_batch"]
        assert train.batch_size % (row["gpus"] * micro) == 0


def test_with_zero_a_checkpoint_has_the_frozen_weights_too(base):
    """Two float32 moments and float32 weights, the trained weights twice, the frozen ones once."""
    recipe = recipe_of("tiny/pretrain", "policy.path=base")
    learns = sum(trained_values(recipe, base).values())
    joint = sum(base.parameters[part] for part in ("ar", "connector", "diffusion"))
    assert checkpoint_bytes(recipe, base, 0) == 4 * 3 * learns
    assert checkpoint_bytes(recipe, base, 1) == 4 * (4 * learns + joint)
    assert checkpoint_bytes(recipe, base, 3) == 4 * (4 * learns + joint - learns)


def test_a_part_that_the_policy_lacks_is_named(capsys):
    overrides = ["policy.path=base", "trainable=[reference_connector]"]
    assert main(["plan", "tiny/pretrain", *overrides]) == 2
    assert "the policy has no reference_connector" in capsys.readouterr().err


def test_one_change_is_named_where_memory_is_short(monkeypatch, capsys):
    recipe = ["tiny/pretrain", "policy.path=base", "policy.device=cpu", "train.batch_size=256"]

    def verdict(*more: str) -> dict:
        assert main(["plan", *recipe, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["verdict"]

    needs = verdict()["needs"]
    monkeypatch.setattr(machine, "memory_bytes", lambda: needs)  # a tenth stays free
    found = verdict()
    assert not found["fits"]
    assert found["decided_by"] == "update"
    after = verdict(found["fix"]["change"])
    assert after["fits"]
    assert after["needs"] == found["fix"]["needs"] < needs
    monkeypatch.setattr(machine, "memory_bytes", lambda: 10**9)
    assert verdict()["fix"] is None


def test_without_flow_matching_no_latents_are_made(base):
    changes = ["policy.path=base", "loss.flow_matching=0", "trainable=[ar]"]
    recipe = recipe_of("tiny/pretrain", *changes)
    assert list(pretrain_memory(recipe, base, Sharding()).phases) == ["update"]


def test_wide_cells_of_a_table_stay_apart():
    assert table_line("null", ["527 neither", "1527 neither"]).endswith("527 neither 1527 neither")
    assert [gigabytes(count) for count in (51.58e9, 999.9e9, 1.96e12)] == ["51.6", "1,000", "1,960"]
