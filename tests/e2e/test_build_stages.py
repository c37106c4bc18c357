"""Building a policy: the losses of pretraining, its data, and every stage from recipe to folder."""

from itertools import islice

import numpy as np
import pytest
import torch

import rl.corpus
import rl.joint_loss
from cli.main import main
from common.errors import RecipeError
from common.journal import read_journal
from data.scenes import TASKS, caption, sample_scene
from policy import Policy
from policy.diffusion import flow_matching_loss
from recipes import load_recipe
from rl.build import build
from rl.corpus import Collator, SceneCorpus
from rl.joint_loss import JointLoss

PARTS = ("ar", "image_tokenizer", "connector", "diffusion", "vae")
PROMPTS = ["a photo of a red circle", "x", 'a sign that says "CAB"']


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """A chunk of the corpus is 2048 pictures; 64 are enough here."""
    monkeypatch.setattr(rl.corpus, "_CHUNK", 64)


def batch_of(policy: Policy) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (policy.config.latent_channels, policy.config.latent_size, policy.config.latent_size)
    rows = [
        {
            "prompt_ids": ids,
            "codes": torch.randint(64, (policy.config.num_tokens,), generator=generator),
            "latents": torch.randn(shape, generator=generator),
        }
        for ids in policy.prompt_ids(PROMPTS)
    ]
    return Collator(policy)(rows)


def plain_hidden(policy: Policy, batch) -> torch.Tensor:
    """Hidden states [B, 1 + N, H] at <S0> and the image tokens, each row alone."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        with torch.no_grad():
            states = policy.ar.model(ids[mask.bool()][None]).last_hidden_state
        rows.append(states[0, -(1 + policy.config.num_tokens) :])
    return torch.stack(rows)


# --- the losses ----------------------------------------------------------------------------------


def test_cross_entropy_is_the_mean_surprise_at_each_image_token(policy):
    batch = batch_of(policy)
    joint = JointLoss(policy, cross_entropy=2.0, flow_matching=0.0)
    losses = joint(**batch)
    first, surprise = policy.config.image_start_id, []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        with torch.no_grad():
            logits = policy.ar(ids[mask.bool()][None]).logits[0, -37:-1, first : first + 64]
        line = logits.double().numpy()
        logprobs = line - np.log(np.exp(line).sum(-1, keepdims=True))
        surprise += [-lp[code - first] for lp, code in zip(logprobs, ids[-36:], strict=True)]
    assert losses.keys() == {"loss", "cross_entropy"}
    assert losses["loss"].item() == pytest.approx(2 * np.mean(surprise), rel=1e-5)
    assert losses["cross_entropy"].item() == pytest.approx(np.mean(surprise), rel=1e-5)


def test_flow_matching_is_the_squared_error_of_the_velocity(policy):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 16, 6, 6, generator=generator)
    noise = torch.randn(3, 16, 6, 6, generator=generator)
    conditions = torch.randn(3, 37, 32, generator=generator)
    time = torch.tensor([0.25, 0.5, 1.0])
    with torch.no_grad():
        found = flow_matching_loss(policy.diffusion, latents, conditions, noise, time)
        errors = []
        for i in range(3):
            t = float(time[i])
            # On the straight line from data (0) to noise (1) the velocity is their difference.
            point = latents[i : i + 1] + t * (noise[i : i + 1] - latents[i : i + 1])
            timestep = torch.tensor([1000 * t])
            out = policy.diffusion(point, conditions[i : i + 1], timestep=timestep).sample[0]
            errors.append(((out + latents[i] - noise[i]) ** 2).mean())
    assert float(found) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


@pytest.fixture
def watched(monkeypatch):
    """Collect what the joint loss hands to the flow-matching loss."""
    calls = []

    def watch(head, latents, conditions, noise, time, reference):
        calls.append((latents, conditions.detach(), noise, time))
        return flow_matching_loss(head, latents, conditions, noise, time, reference)

    monkeypatch.setattr(rl.joint_loss, "flow_matching_loss", watch)
    return calls


def test_the_head_is_conditioned_on_the_states_of_its_own_picture(policy, watched):
    batch = batch_of(policy)
    joint = JointLoss(policy, cross_entropy=1.0, flow_matching=3.0, condition_dropout=0.0)
    losses = joint(**batch)
    [(latents, conditions, noise, time)] = watched
    assert torch.equal(latents, batch["latents"])
    with torch.no_grad():
        expected = policy.connector(plain_hidden(policy, batch))
        torch.testing.assert_close(conditions, expected, atol=1e-4, rtol=1e-4)
        matching = flow_matching_loss(policy.diffusion, latents, conditions, noise, time)
    assert losses["flow_matching"].item() == pytest.approx(float(matching), rel=1e-5)
    total = losses["cross_entropy"] + 3 * losses["flow_matching"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("seeds", [None, list(range(400))], ids=["per batch", "per sample"])
def test_noise_and_time_are_drawn_as_flow_matching_needs_them(policy, watched, seeds):
    batch = {
        key: value[:1].expand(400, *value.shape[1:]) for key, value in batch_of(policy).items()
    }
    torch.manual_seed(0)
    with torch.no_grad():
        JointLoss(policy, cross_entropy=0, flow_matching=1, condition_dropout=0.3)(
            **batch, seeds=seeds
        )
    [(_, conditions, noise, time)] = watched
    assert 0 < float(time.min()) < 0.05
    assert 0.95 < float(time.max()) <= 1
    assert abs(float(time.mean()) - 0.5) < 0.05
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert not torch.equal(noise[0], noise[1])
    null = policy.null_conditions().detach()
    dropped = (conditions - null).flatten(1).abs().amax(1) < 1e-5
    assert 0.2 < float(dropped.float().mean()) < 0.4
    own = conditions[~dropped]
    torch.testing.assert_close(own, own[:1].expand_as(own), atol=1e-4, rtol=1e-4)


def test_without_any_condition_every_row_is_the_null_condition(policy, watched):
    joint = JointLoss(policy, cross_entropy=0, flow_matching=1, condition_dropout=1.0)
    joint(**batch_of(policy))
    [(_, conditions, _, _)] = watched
    null = policy.connector(torch.zeros(1, 37, 64)).detach()
    assert torch.equal(policy.null_conditions().detach(), null)
    torch.testing.assert_close(conditions, null.expand_as(conditions), atol=1e-6, rtol=0)


def test_hidden_noise_is_measured_in_standard_deviations(policy):
    seen = []
    policy.connector.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batch = batch_of(policy)
    for noise in (0.0, 0.5):
        JointLoss(
            policy, cross_entropy=0, flow_matching=1, condition_dropout=0, hidden_noise=noise
        )(**batch)
    plain, noisy = seen
    assert float((noisy - plain).std() / plain.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("part", ["ar", "head"])
def test_gradients_reach_the_parts_that_learn_and_no_others(policy, part):
    policy.requires_grad_(False)
    learns = [policy.ar] if part == "ar" else [policy.connector, policy.diffusion]
    for module in learns:
        module.requires_grad_(True)
    ar = part == "ar"
    joint = JointLoss(policy, cross_entropy=float(ar), flow_matching=float(not ar))
    joint(**batch_of(policy))["loss"].backward()
    with_gradient = {n.split(".")[0] for n, p in joint.named_parameters() if p.grad is not None}
    assert with_gradient == ({"ar"} if ar else {"connector", "diffusion"})


# --- the data ------------------------------------------------------------------------------------


def corpus(policy, **options) -> SceneCorpus:
    tasks = {"colors": 1.0, "position": 1.0}
    return SceneCorpus(policy, tasks, seed=3, length=10_000, **options)


def words(policy, row) -> str:
    return policy.tokenizer.decode(row["prompt_ids"][1:-3])


def test_the_corpus_is_pictures_with_their_captions_codes_and_latents(policy):
    rows = list(islice(corpus(policy, with_latents=True), 64))
    for row in rows[:5]:
        assert row["codes"].shape == (36,)
        assert row["latents"].shape == (16, 6, 6)
        assert row["prompt_ids"] == policy.prompt_ids([words(policy, row)])[0]
        assert words(policy, row).startswith("a photo of")
    assert len({words(policy, row) for row in rows}) > 20
    assert len({tuple(row["codes"].tolist()) for row in rows}) > 40
    assert "latents" not in next(iter(corpus(policy)))


def test_a_chunk_depends_on_seed_and_number_alone(policy):
    first, again = (list(islice(corpus(policy), 150)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        assert torch.equal(one["codes"], other["codes"])
    there, back = corpus(policy), first[100]
    assert there[5]["prompt_ids"] == first[5]["prompt_ids"]
    assert there[100]["prompt_ids"] == back["prompt_ids"]  # from any place
    assert there[100]["seed"] == back["seed"] != first[101]["seed"]
    assert [r["prompt_ids"] for r in first[:64]] != [r["prompt_ids"] for r in first[64:128]]


def test_caption_noise_is_the_share_of_captions_that_do_not_fit(policy):
    shares = {}
    truth = [words(policy, row) for row in islice(corpus(policy), 64)]
    codes = [row["codes"] for row in islice(corpus(policy), 64)]
    for noise in (0.5, 1.0):
        rows = list(islice(corpus(policy, caption_noise=noise), 64))
        assert all(torch.equal(row["codes"], c) for row, c in zip(rows, codes, strict=True))
        shares[noise] = np.mean(
            [words(policy, row) != t for row, t in zip(rows, truth, strict=True)]
        )
    assert 0.3 < shares[0.5] < 0.7
    assert shares[1.0] > 0.95


def test_batches_are_padded_on_the_left_and_end_with_the_picture(policy):
    batch = batch_of(policy)
    width = max(map(len, policy.prompt_ids(PROMPTS)))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, width + 36)
    for ids, mask, prompt in zip(
        batch["input_ids"], batch["attention_mask"], policy.prompt_ids(PROMPTS), strict=True
    ):
        start = width - len(prompt)
        assert mask.tolist() == [0] * start + [1] * (len(prompt) + 36)
        assert ids[start:width].tolist() == prompt
        assert (ids[width:] >= policy.config.image_start_id).all()


# --- the stages ----------------------------------------------------------------------------------


class Counting:
    def __init__(self) -> None:
        self.total, self.done = 0, 0
        self.repeatable: list[bool] = []

    def start(self, task, total):
        self.total = total

    def advance(self, task, n=1, **facts):
        self.done += n
        self.repeatable.append(torch.are_deterministic_algorithms_enabled())
        assert facts

    def finish(self, task):
        pass

    def line(self, text):
        pass


SMALL = ("train.steps=3", "train.batch_size=4")
STAGES = {
    "1-image-tokenizer": (["image_tokenizer"], ("train.unquantized_steps=1",)),
    "2-autoencoder": (["vae"], ()),
    "3-language-model": (["ar"], ("train.compile=false", "train.warmup_steps=1")),
    "4-noisy-captions": (
        ["ar"],
        ("train.compile=false", "train.optimizer=adamw", "train.warmup_steps=1"),
    ),
    "5-diffusion-head": (["connector", "diffusion"], ("train.warmup_steps=1",)),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_its_parts_and_leaves_a_policy(policy_folder, tmp_path, capfd, stage):
    parts, overrides = STAGES[stage]
    recipe = load_recipe(f"base/{stage}", [f"policy.path={policy_folder}", *SMALL, *overrides])
    progress = Counting()
    capfd.readouterr()
    build(recipe, tmp_path / "run", progress)
    text = capfd.readouterr()
    assert text.out == ""
    assert text.err == ""
    before = Policy.from_pretrained(policy_folder)
    after = Policy.from_pretrained(tmp_path / "run" / "policy")
    for part in PARTS:
        states = [getattr(p, part).state_dict() for p in (before, after)]
        moved = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
        assert bool(moved) == (part in parts), part
    assert all(torch.isfinite(tensor).all() for tensor in after.state_dict().values())
    assert [s["recipe"] for s in after.config.provenance["stages"]] == [recipe.recipe.name]
    assert (progress.total, progress.done) == (3, 3)
    assert all(progress.repeatable)
    assert not torch.are_deterministic_algorithms_enabled()
    rows = read_journal(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 3
    assert load_recipe(tmp_path / "run" / "recipe.yaml").recipe == recipe.recipe
    [picture] = after.generate(["a photo of a red circle"], steps=1)
    assert picture.size == (48, 48)


def test_the_autoencoder_stage_sets_the_scale_of_the_latents(policy_folder, tmp_path):
    recipe = load_recipe("base/2-autoencoder", [f"policy.path={policy_folder}", *SMALL])
    build(recipe, tmp_path / "run")
    policy = Policy.from_pretrained(tmp_path / "run" / "policy")
    rng = np.random.default_rng(0)
    from data.scenes import paint

    tasks = dict.fromkeys(TASKS, 1.0)
    pictures = np.stack([paint(sample_scene(rng, tasks, "train")) for _ in range(64)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert float(policy.encode_latents(pixels).std()) == pytest.approx(1, rel=0.15)


def test_the_first_stage_starts_from_nothing(tmp_path):
    recipe = load_recipe("base/1-image-tokenizer", [*SMALL, "train.unquantized_steps=1"])
    build(recipe, tmp_path / "run")
    policy = Policy.from_pretrained(tmp_path / "run" / "policy")
    # Every caption of the scene world fits into a short prompt, its tasks all known.
    rng = np.random.default_rng(1)
    captions = [caption(sample_scene(rng, dict.fromkeys(TASKS, 1.0), "train")) for _ in range(50)]
    assert max(map(len, policy.prompt_ids(captions))) < 40
    assert policy.config.num_image_tokens == policy.image_tokenizer.config["codebook_size"]


def test_stages_are_repeatable(policy_folder, tmp_path):
    results = []
    overrides = [f"policy.path={policy_folder}", *SMALL, "train.warmup_steps=0"]
    for name in ("one", "two"):
        build(load_recipe("base/5-diffusion-head", overrides), tmp_path / name)
        results.append(Policy.from_pretrained(tmp_path / name / "policy").state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_stages_follow_one_another(policy_folder, tmp_path):
    build(
        load_recipe("base/2-autoencoder", [f"policy.path={policy_folder}", *SMALL]), tmp_path / "a"
    )
    overrides = [f"policy.path={tmp_path / 'a' / 'policy'}", *SMALL, "train.warmup_steps=0"]
    build(load_recipe("base/5-diffusion-head", overrides), tmp_path / "b")
    policy = Policy.from_pretrained(tmp_path / "b" / "policy")
    stages = policy.config.provenance["stages"]
    assert [stage["recipe"] for stage in stages] == ["autoencoder", "diffusion-head"]


def test_pretraining_lowers_the_loss_it_minimises(policy_folder, tmp_path):
    overrides = [
        f"policy.path={policy_folder}", "train.steps=60", "train.batch_size=16",
        "train.compile=false", "train.warmup_steps=2", "data.tasks={colors: 1}",
    ]  # fmt: skip
    build(load_recipe("base/3-language-model", overrides), tmp_path / "run")
    losses = {}
    for name, folder in (("before", policy_folder), ("after", tmp_path / "run" / "policy")):
        policy = Policy.from_pretrained(folder)
        rows = list(islice(SceneCorpus(policy, {"colors": 1.0}, seed=99, length=32), 32))
        batch = Collator(policy)(rows)
        joint = JointLoss(policy, cross_entropy=1, flow_matching=0)
        with torch.no_grad():
            losses[name] = float(joint(**batch)["loss"])
    assert losses["after"] < losses["before"] - 1


# --- what a stage refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "data.source=shards-{000..009}.tar",
        "data.split=tune",
        "policy.dtype=bfloat16",
        "policy.device=cuda",
        "log={trackers: [wandb]}",
        "train.optimizer=adamw",
        "train.warmup_steps=10",
        "train.decay_steps=10",
        "train.weight_decay=0.1",
        "train.grad_clip=null",
        "train.compile=true",
        "train.unquantized_steps=1200",
    ],
)
def test_a_value_that_building_does_not_act_on_is_a_problem_of_the_recipe(override):
    with pytest.raises(RecipeError) as caught:
        load_recipe("base/1-image-tokenizer", [override])
    [problem] = caught.value.problems
    assert problem.key == override.split("=")[0]
    assert problem.fix


def test_the_command_line_builds_stages(tmp_path, capsys):
    run = tmp_path / "run"
    short = ["train.steps=2", "train.unquantized_steps=1", "train.batch_size=4"]
    assert main(["train", "base/1-image-tokenizer", *short, "--out", str(run)]) == 0
    assert (run / "policy" / "policy.json").is_file()
    assert str(run / "policy") in capsys.readouterr().out
