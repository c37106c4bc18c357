"""The command line: verbs, messages, exit codes. What `rl.run` and `policy` do is tested there."""

import json
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
from picture_folder import write_scenes
from PIL import Image
from rich.text import Text
from typer.main import get_command

from cli.main import build_app, main
from common.errors import Interrupted, RunError
from data.packing import pack
from recipes import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")


def tensors(folder, shapes, dtype="F32"):
    """Write a safetensors file by its specification: length, JSON header, data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


@pytest.fixture
def small_policy(tmp_path):
    folder = tmp_path / "small"
    tensors(
        folder / "ar",
        {
            "model.embed_tokens.weight": [50, 8],
            "model.layers.0.self_attn.q_proj.weight": [16, 8],
            "model.layers.0.self_attn.v_proj.weight": [4, 8],
            "model.norm.weight": [8],
        },
    )
    tensors(folder / "vae", {"x": [3, 4]})
    (folder / "policy.json").write_text(json.dumps({"grid": 2, "num_image_tokens": 32}))
    config = {
        "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    (folder / "ar" / "config.json").write_text(json.dumps(config))
    return folder


# --- main --------------------------------------------------------------------------------------


def test_help_is_quick_lists_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from cli.main import main; code = main(['--help'])\n"
        "seconds = time.process_time() - start\n"
        "assert code == 0 and not {'torch', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)\n"
        "print(seconds, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert min(float(run.stderr) for run in runs) < 1.5  # 0.3 s on an idle core
    for verb in (
        "new",
        "ls",
        "check",
        "plan",
        "schema",
        "pack",
        "train",
        "resume",
        "sample",
        "doctor",
    ):
        assert f" {verb} " in runs[0].stdout


def test_help_loses_no_text_and_breaks_no_line_of_a_terminal():
    commands = [get_command(build_app())]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            assert Text.from_markup(text).plain == text, (command.name, parameter.name)
        for paragraph in (command.help or "").split("\n\n"):
            lines = paragraph.splitlines()
            assert len(lines) <= 1 or max(map(len, lines)) <= 78, (command.name, paragraph)
    assert len(commands) > 20


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["ls", "nonsense"], ["sample"]])
def test_wrong_use_ends_with_2(arguments):
    assert main(arguments) == 2


def fake_run(monkeypatch, train):
    module = types.ModuleType("rl.run")
    module.train = train
    module.resume = lambda run_dir, progress: train(None, run_dir, progress)
    package = types.ModuleType("rl")
    package.run = module
    monkeypatch.setitem(sys.modules, "rl", package)
    monkeypatch.setitem(sys.modules, "rl.run", module)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (Interrupted("stopped at step 7. Fix: atelier resume runs/x"), 75, "stopped at step 7"),
        (RunError("no reward could be computed"), 1, "no reward"),
        (OSError(28, "No space left on device", "metrics.jsonl"), 1, "disk is full"),
    ],
)
def test_errors_become_one_message_and_an_exit_code(monkeypatch, capsys, raised, code, message):
    def train(loaded, run_dir, progress):
        raise raised

    fake_run(monkeypatch, train)
    assert main(["train", "geneval-scenes"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("raised", [ZeroDivisionError(), OSError(5, "I/O error")])
def test_unexpected_exceptions_keep_their_traceback(monkeypatch, raised):
    def train(loaded, run_dir, progress):
        raise raised

    fake_run(monkeypatch, train)
    with pytest.raises(type(raised)):
        main(["train", "geneval-scenes"])


# --- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["geneval-scenes", "geneval-scenes-full", "blip3o-next-3b/grpo-geneval"]
)
def test_new_copies_comments_and_changes_nothing_but_the_name(name, tmp_path, capsys):
    assert main(["new", name, "sub/mine.yaml"]) == 0
    assert "wrote sub/mine.yaml" in capsys.readouterr().out
    copy, original = load_recipe("sub/mine.yaml"), load_recipe(name)
    assert copy.recipe == original.recipe.model_copy(update={"name": "mine"})
    first = original.files[0].read_text().splitlines()[0]
    assert (tmp_path / "sub/mine.yaml").read_text().startswith(first)


def test_new_never_overwrites(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("precious")
    assert main(["new", "geneval-scenes", "mine.yaml"]) == 2
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    assert main(["new", "geneval-scenes", "mine.txt"]) == 2
    assert main(["new", "mine2.yaml", "geneval-scenes"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_ls_shows_recipes_with_what_they_are(capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("geneval-scenes ")
    assert "GRPO with LoRA" in lines[0]


def test_ls_says_of_every_suite_what_it_is_and_whether_it_has_a_leaderboard(capsys):
    assert main(["ls", "suites"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["geneval"].endswith("(553 x 4); leaderboard: yes, with the published detector")
    assert sum("; leaderboard: " in line for line in lines.values()) >= 16


def test_check_shows_every_value_and_its_origin(capsys):
    assert main(["check", "geneval-scenes-full", "train.steps=40"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["steps", "40", "override"] in lines
    assert ["learning_rate", "0.0002", "recipes/geneval-scenes-full.yaml:12"] in lines
    assert ["weight_decay", "0.0", "default"] in lines
    assert lines[-1] == ["ok"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("evals.suite=nope", "no suite is called `nope`"),
        ("policy.path=/nowhere", "/nowhere is not a policy folder"),
        ("policy.lora.targets=[q_prj]", "no linear map `q_prj`"),
        ("prompts.source=/nowhere.jsonl", "/nowhere.jsonl: no such file"),
        ("rewards.functions.0.use=gneval", "no reward is called `gneval`. Did you mean `geneval`?"),
    ],
)
def test_check_finds_what_a_run_would_stop_at(capsys, override, told):
    assert main(["check", "geneval-scenes", override]) in (1, 2)
    assert told in capsys.readouterr().err


def test_check_takes_a_run_folder_for_no_policy_as_train_does(tmp_path, capsys):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "policy.json").write_text("{}")
    assert main(["check", "geneval-scenes", f"policy.path={tmp_path}"]) == 1
    assert f"Fix: give {tmp_path}/policy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("policy.path=/nowhere", "/nowhere is not a policy folder"),
        ("trainable=[reference_connector]", "the policy has no reference_connector"),
        ("data.source=/nowhere/{0..3}.tar", "/nowhere/0.tar: no such shard (4 of 4"),
        ("data={references: 1, context: 40}", "data.context is 40"),
        ("policy.lora={targets: [nix]}", "no linear map `nix`"),
    ],
)
def test_check_finds_what_pretraining_would_stop_at(capsys, override, told):
    assert main(["check", "tiny/pretrain"]) == 0
    assert main(["check", "tiny/pretrain", override]) in (1, 2)
    assert told in capsys.readouterr().err


def test_check_reads_the_first_shard_s_headers(tmp_path, capsys):
    pack(write_scenes(tmp_path / "scenes", 2), tmp_path / "shards")
    source = f"data.source={tmp_path / 'shards'}"
    assert main(["check", "tiny/pretrain", source]) == 0
    assert main(["check", "tiny/edit", source]) == 1
    assert "no reference" in capsys.readouterr().err


def test_plan_of_pretraining_names_an_unknown_target(capsys):
    assert main(["plan", "tiny/pretrain", "policy.path=base", "policy.lora={targets: [nix]}"]) == 2
    assert "no linear map `nix`" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [["tiny/pretrain"], ["geneval-scenes"]])
def test_deepspeed_without_a_launcher_is_refused_before_anything_is_loaded(
    recipe, tmp_path, capsys
):
    overrides = ["train.deepspeed=zero1", "policy.path=/nowhere", "--out", str(tmp_path / "run")]
    assert main(["train", *recipe, *overrides]) == 1
    assert "torchrun --nproc_per_node 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_check_as_json(capsys):
    assert main(["check", "geneval-scenes", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["valid"] is True
    assert facts["recipe"]["train"]["steps"] == 80
    assert facts["provenance"]["policy.path"].startswith("recipes/geneval-scenes.yaml:")


def test_check_of_a_wrong_recipe_ends_with_2(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("extends: geneval-scenes\ntrain:\n  stepz: 3\n")
    assert main(["check", "bad.yaml"]) == 2
    captured = capsys.readouterr()
    assert "bad.yaml:3  train.stepz = 3" in captured.err
    assert "did you mean `steps`" in captured.err
    assert main(["check", "bad.yaml", "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["where"], problem["key"]) == ("bad.yaml:3", "train.stepz")


def test_what_only_a_run_would_refuse_is_json_too(tmp_path, capsys):
    assert main(["check", "geneval-scenes", "decode.train.tile=7", "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["message"].startswith("decode.train.tile")
    assert "decode.train.tile" in problem["fix"]


def test_schema_is_json_and_can_be_written(tmp_path, capsys):
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(["schema", "--out", "recipe.schema.json"]) == 0
    assert json.loads((tmp_path / "recipe.schema.json").read_text()) == printed


# --- runs --------------------------------------------------------------------------------------


def test_train_hands_over_the_recipe_and_says_what_comes_next(monkeypatch, capsys):
    seen = []

    def train(loaded, run_dir, progress):
        progress.start("train", 2)
        progress.advance("train", reward=0.25)
        progress.finish("train")
        seen.append((loaded.recipe.train.steps, run_dir))

    fake_run(monkeypatch, train)
    assert main(["train", "geneval-scenes", "train.steps=2"]) == 0
    assert main(["train", "geneval-scenes", "train.steps=3", "--out", "elsewhere"]) == 0
    assert seen == [(2, Path("runs/geneval-scenes")), (3, Path("elsewhere"))]
    captured = capsys.readouterr()
    assert "train 1/2  reward 0.25" in captured.err
    assert "runs/geneval-scenes/policy" in captured.out


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("recipe.yaml", "atelier resume runs/geneval-scenes"),
        ("policy/policy.json", "finished run"),
        ("notes.txt", "not empty"),
    ],
)
def test_train_never_uses_a_folder_twice(monkeypatch, capsys, tmp_path, file, message):
    place = tmp_path / "runs/geneval-scenes" / file
    place.parent.mkdir(parents=True)
    place.touch()

    def train(*_):
        raise AssertionError

    fake_run(monkeypatch, train)
    assert main(["train", "geneval-scenes"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--out runs/geneval-scenes-2" in error


def test_resume_needs_a_run(monkeypatch, capsys, tmp_path):
    seen = []
    fake_run(monkeypatch, lambda loaded, run_dir, progress: seen.append(run_dir))
    assert main(["resume", "runs/x"]) == 2
    assert "not a run" in capsys.readouterr().err
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/recipe.yaml").write_text("extends: geneval-scenes\n")
    assert main(["resume", "runs/x"]) == 0
    assert seen == [Path("runs/x")]


def test_sample_draws_a_sheet_that_says_how_it_was_made(monkeypatch, small_policy, tmp_path):
    calls = []

    class Policy:
        @classmethod
        def from_pretrained(cls, folder, dtype, device):
            assert folder == small_policy
            return cls()

        def state_dict(self):
            return {}

        def settings(self):
            return {}

        def generate(self, prompts, **settings):
            calls.append((prompts, settings))
            color = (0, 0, 255) if "blue" in prompts[0] else (255, 0, 0)
            return [Image.new("RGB", (48, 48), color) for _ in prompts]

    module = types.ModuleType("policy")
    module.Policy = Policy
    monkeypatch.setitem(sys.modules, "policy", module)
    prompts = ["a photo of a red circle", "a <b>blue</b> ring " + "very " * 40 + "far"]
    arguments = ["sample", str(small_policy), *prompts, "-n", "3", "--seed", "5", "--guidance", "2"]
    assert main(arguments) == 0
    assert main([*arguments[:2], *reversed(prompts), *arguments[4:], "--out", "other.png"]) == 0
    assert main(arguments) == 0
    assert (tmp_path / "sample-2.png").is_file()

    seeds = {(*prompts, *settings["seeds"]) for prompts, settings in calls}
    assert len(seeds) == 2  # a prompt keeps its seeds wherever it stands
    assert len({seed for row in seeds for seed in row[3:]}) == 6
    assert calls[0][1]["guidance"] == 2
    with Image.open(tmp_path / "sample.png") as sheet:
        facts = json.loads(sheet.text["atelier"])
        pixels = [sheet.getpixel((60, y)) for y in range(sheet.height)]
    assert (facts["prompts"], facts["seed"], facts["n"]) == (prompts, 5, 3)
    assert pixels.count((255, 0, 0)) == pixels.count((0, 0, 255)) == 144  # 48 px, enlarged 3 times
    assert pixels.index((255, 0, 0)) < pixels.index((0, 0, 255))
    assert main(["sample", str(small_policy), "x", "--out", "x.jpg"]) == 2
