"""Recipes: composition, overrides, origins, errors and the shipped files."""

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import RecipeError
from recipes import dump_recipe, load_recipe, recipe_summary, shipped_recipes
from recipes.schema import file_schema
from recipes.schema_grpo import SCENE_TASKS
from recipes.yaml_loader import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
SMALL = """\
version: 1
kind: grpo
name: small
rewards:
  functions:
    - use: geneval
    - {use: ocr, weight: 0.5}
train: {steps: 3, learning_rate: 1e-5}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def writer(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return writer


def problems_of(*arguments):
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments)
    return caught.value.problems


# --- shipped ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_commented(name):
    file = shipped_recipes()[name]
    load_recipe(name)
    assert recipe_summary(file)
    assert file.read_text().isascii()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_obeys_the_editor_schema(name):
    value = parse_yaml(shipped_recipes()[name].read_bytes(), name).value
    jsonschema.validate(value, file_schema())


def test_editor_schema_refuses_an_unknown_key():
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"kind": "grpo", "train": {"learning_rte": 1}}, file_schema())


def test_recommended_recipe_has_the_values_of_the_recorded_run():
    recipe = load_recipe("geneval-scenes").recipe
    assert (recipe.rollout.group_size, recipe.rollout.prompts_per_step) == (12, 12)
    assert (recipe.rollout.engine, recipe.rollout.temperature) == ("transformers", 1.0)
    assert (recipe.policy.path, recipe.policy.lora.rank) == ("base", 16)
    decode = recipe.decode.train
    assert (decode.steps, decode.guidance, decode.noise) == (2, 1.0, "shared_in_group")
    assert (recipe.decode.eval.steps, recipe.decode.eval.guidance) == (6, 1.5)
    assert recipe.rewards.functions[0].use == "geneval"
    assert recipe.rewards.functions[0].args["extra_penalty"] == 0.15
    assert (recipe.algorithm.beta, recipe.algorithm.clip_low) == (0.04, 0.2)
    assert (recipe.train.steps, recipe.train.learning_rate) == (80, 1e-3)


def test_variants_differ_from_the_recommended_recipe_only_where_they_say():
    def flat(name):
        loaded = load_recipe(name)
        return {key: pick(loaded.recipe.model_dump(), key) for key in loaded.provenance}

    def pick(value, key):
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list | tuple) else value[part]
        return value

    base = flat("geneval-scenes")
    full, vllm = flat("geneval-scenes-full"), flat("geneval-scenes-vllm")
    changed = {key for key in full if base.get(key, "absent") != full[key]}
    assert changed == {"name", "policy.lora", "train.learning_rate"}
    assert (full["policy.lora"], full["train.learning_rate"]) == (None, 2e-4)
    assert {key for key in vllm if base[key] != vllm[key]} == {"name", "rollout.engine"}
    ocr = load_recipe("ocr-scenes").recipe
    assert (ocr.prompts.tasks, ocr.rewards.functions[0].use) == ({"text": 1}, "ocr")


def test_scene_tasks_are_those_of_the_scene_world():
    scenes = pytest.importorskip("data.scenes")
    assert set(SCENE_TASKS) == set(scenes.TASKS)


def test_importing_recipes_is_quick_and_takes_no_torch():
    # Processor time, because the clock also counts what else the machine does.
    code = (
        "import sys, time; start = time.process_time(); import recipes; "
        "print(time.process_time() - start); "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, check=True, cwd=ROOT, capture_output=True) for _ in range(4)]
    assert min(float(run.stdout) for run in runs) < 1.5  # 0.3 s on an idle core


# --- composition -----------------------------------------------------------------------------


def test_extends_merges_mappings_replaces_lists_and_remembers_origins(write):
    write("a/base.yaml", SMALL)
    write("a/middle.yaml", "extends: base.yaml\nname: middle\ntrain:\n  warmup_steps: 2\n")
    top = write(
        "top.yaml", "extends: a/middle.yaml\ntrain: {steps: 9}\nrewards:\n  functions: [{use: ocr}]"
    )
    loaded = load_recipe("top.yaml", ["train.grad_clip=null"])
    recipe = loaded.recipe
    assert (recipe.name, recipe.train.steps, recipe.train.warmup_steps) == ("middle", 9, 2)
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.grad_clip is None
    assert [function.use for function in recipe.rewards.functions] == ["ocr"]
    assert loaded.files == (top, top.parent / "a/middle.yaml", top.parent / "a/base.yaml")
    expected = {
        "name": "a/middle.yaml:2",
        "train.steps": "top.yaml:2",
        "train.warmup_steps": "a/middle.yaml:4",
        "train.learning_rate": "a/base.yaml:8",
        "train.grad_clip": "override",
        "train.weight_decay": "default",
        "rewards.functions.0.use": "top.yaml:4",
        "rewards.functions.0.weight": "default",
        "seed": "default",
    }
    assert {key: loaded.provenance[key] for key in expected} == expected
    assert not any(key.startswith("rewards.functions.1") for key in loaded.provenance)


def test_a_section_set_to_null_and_filled_again(write):
    write("base.yaml", SMALL)
    write("off.yaml", "extends: base.yaml\npolicy: {lora: null}\n")
    assert load_recipe("off.yaml").recipe.policy.lora is None
    assert load_recipe("off.yaml", ["policy.lora.rank=4"]).recipe.policy.lora.rank == 4


def test_a_circle_of_recipes_is_refused(write):
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "name: x\nextends: a.yaml\n")
    (problem,) = problems_of("a.yaml")
    assert problem.where == "b.yaml:2"
    assert "a.yaml -> b.yaml -> a.yaml" in problem.message


def test_overrides_reach_list_items_and_are_read_as_yaml(write):
    write("r.yaml", SMALL)
    overrides = [
        "rewards.functions.1.weight=2",
        "train.learning_rate=1e-3",
        "policy.lora.targets=[q_proj, v_proj]",
        "prompts.tasks={position: 2}",
        "policy.path=a=b",
        "evals.limit=null",
    ]
    recipe = load_recipe("r.yaml", overrides).recipe
    assert [function.weight for function in recipe.rewards.functions] == [1, 2]
    assert recipe.train.learning_rate == 1e-3
    assert recipe.policy.lora.targets == ("q_proj", "v_proj")
    assert recipe.prompts.tasks == {"position": 2}
    assert recipe.policy.path == "a=b"
    assert recipe.evals.limit is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "form key=value"),
        ("=3", "form key=value"),
        ("train.steps=", "no value"),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps={a: 1, a: 2}", "twice"),
        ("name.first=x", "no keys"),
        ("rewards.functions.7.weight=1", "list of 2"),
        ("rewards.functions.x=1", "list of 2"),
        ("extends=geneval-scenes", "files only"),
        (".".join("a" * 40) + "=1", "too many parts"),
    ],
)
def test_wrong_overrides_are_explained(write, override, message):
    write("r.yaml", SMALL)
    problems = problems_of("r.yaml", [override])
    assert any(message in problem.message for problem in problems)
    assert all("override" in problem.where for problem in problems)


# --- errors ----------------------------------------------------------------------------------


def test_all_problems_are_reported_together_each_with_place_value_and_fix(write):
    write(
        "bad.yaml",
        """\
version: 1
kind: grpo
name: "x y"
learning_rate: 3
train:
  learning_rte: 1e-3
  steps: "80"
rollout:
  engine: vlm
  engine: vllm
  group_size: 1
rewards:
  functions:
    - use: geneval
      wieght: 3
""",
    )
    problems = {(p.where, p.key): p for p in problems_of("bad.yaml", ["train.grad_clip=no"])}
    assert set(problems) == {
        ("bad.yaml:3", "name"),
        ("bad.yaml:4", "learning_rate"),
        ("bad.yaml:5", "train.learning_rate"),
        ("bad.yaml:6", "train.learning_rte"),
        ("bad.yaml:7", "train.steps"),
        ("bad.yaml:9", "rollout.engine"),
        ("bad.yaml:10", "rollout.engine"),
        ("bad.yaml:11", "rollout.group_size"),
        ("bad.yaml:15", "rewards.functions.0.wieght"),
        ("override", "train.grad_clip"),
    }
    assert (
        problems["bad.yaml:4", "learning_rate"].fix == "move it: the key is `train.learning_rate`."
    )
    assert problems["bad.yaml:6", "train.learning_rte"].fix == "did you mean `learning_rate`?"
    assert problems["bad.yaml:9", "rollout.engine"].fix == "did you mean `vllm`?"
    assert "'transformers', 'vllm'" in problems["bad.yaml:9", "rollout.engine"].message
    assert problems["bad.yaml:7", "train.steps"].seen == '"80"'
    assert problems["bad.yaml:15", "rewards.functions.0.wieght"].fix == "did you mean `weight`?"
    assert problems["override", "train.grad_clip"].seen == '"no"'


def test_a_value_in_a_list_is_shown_with_the_place_it_comes_from():
    (problem,) = problems_of("geneval-scenes", ["rewards.functions.0.weight=0"])
    assert (problem.where, problem.seen) == ("override", "0")


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("train.micro_batch=7", "train.micro_batch", "144"),
        ("train.deepspeed=zero3", "train.deepspeed", "zero3 cuts"),
        ("prompts.tasks={shapes: 1}", "prompts.tasks.shapes", "no task"),
        ("prompts.tasks={text: 0}", "prompts.tasks", "weight 0"),
        ("rewards.functions.0.weight=0", "rewards.functions.0.weight", "no effect"),
        ("prompts.split=held_out", "prompts.split", "train"),
        ("train.learning_rate=.nan", "train.learning_rate", "finite"),
        ("algorithm.drop_zero_variance=yes", "algorithm.drop_zero_variance", "boolean"),
        ("train.steps=1.5", "train.steps", "integer"),
        ("train=3", "train", "mapping"),
        ("kind=[]", "kind", "grpo"),
        ("kind=gpro", "kind", "grpo"),
        ("version=2", "version", "1"),
    ],
)
def test_values_out_of_range_are_explained(override, key, message):
    (problem,) = problems_of("geneval-scenes", [override])
    assert problem.key == key
    assert message in problem.message
    assert problem.fix


def test_a_recipe_that_is_not_there(write):
    assert "did you mean `geneval-scenes`" in problems_of("geneval-scene")[0].fix
    assert "no file" in problems_of("nowhere.yaml")[0].message
    assert "`geneval-scenes`" in problems_of("recipes/geneval-scenes.yaml")[0].fix
    assert problems_of("a\0.yaml")
    assert problems_of("x" * 5000 + ".yaml")
    write("list.yaml", "[1, 2]")
    assert "mapping" in problems_of("list.yaml")[0].message
    write("empty.yaml", "")
    assert "mapping" in problems_of("empty.yaml")[0].message
    write("up.yaml", "name: x\nextends: gone.yaml\n")
    assert problems_of("up.yaml")[0].where == "up.yaml:2"


# --- the resolved recipe -----------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_dumped_recipe_loads_to_the_same_recipe(name, write):
    recipe = load_recipe(name, ["seed=7", "name=1e-5x"]).recipe
    write("resolved.yaml", dump_recipe(recipe))
    assert load_recipe("resolved.yaml").recipe == recipe


@pytest.mark.parametrize("kind", ["pretrain", "image_tokenizer", "autoencoder"])
def test_the_kinds_that_build_a_policy(kind, write):
    train = "train: {steps: 501, learning_rate: 1e-3, batch_size: 8}"
    write("r.yaml", f"version: 1\nkind: {kind}\nname: b\n{train}\n")
    assert load_recipe("r.yaml").recipe.train.batch_size == 8
    assert "unknown key" in problems_of("r.yaml", ["rollout.engine=vllm"])[0].message.lower()


def test_a_scaling_that_the_aggregation_would_ignore_is_refused():
    overrides = [
        "rewards.multi_objective_aggregation=normalize_then_sum", "algorithm.advantage_scale=none"
    ]  # fmt: skip
    [problem] = problems_of("geneval-scenes", overrides)
    assert problem.key == "algorithm.advantage_scale"


# --- fuzz ------------------------------------------------------------------------------------


def assert_valid_or_explained(*arguments):
    explained = None
    try:
        load_recipe(*arguments)
    except RecipeError as error:
        explained = error
    assert explained is None or (explained.problems and "Fix: " in str(explained))


SHIPPED_TEXT = shipped_recipes()["geneval-scenes"].read_text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["use", "rank", "steps", "x", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)
PATHS = st.lists(
    st.sampled_from(["train", "steps", "rewards", "functions", "0", "policy", "lora", "kind", "x"]),
    min_size=1,
    max_size=4,
)


@given(path=PATHS, value=VALUES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_override_ends_in_a_recipe_or_a_recipe_error(path, value):
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    override = ".".join(path) + "=" + text.removesuffix("...\n")
    assert_valid_or_explained("geneval-scenes", [override])


@given(position=st.integers(0, len(SHIPPED_TEXT)), cut=st.integers(0, 30), new=st.text(max_size=12))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_edit_of_a_recipe_ends_in_a_recipe_or_a_recipe_error(tmp_path, position, cut, new):
    file = tmp_path / "edited.yaml"
    edited = SHIPPED_TEXT[:position] + new + SHIPPED_TEXT[position + cut :]
    file.write_bytes(edited.encode("utf-8", "surrogatepass"))
    assert_valid_or_explained(file)


@given(name=st.text(max_size=20), suffix=st.sampled_from(["", ".yaml", "/x.yml"]))
@settings(max_examples=100, deadline=None)
def test_any_name_ends_in_a_recipe_error(name, suffix):
    with pytest.raises(RecipeError):
        load_recipe("zz" + name + suffix)


def test_the_fix_for_tasks_of_shards_works_for_a_shipped_recipe():
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny/sft", ["data.source=shards"])
    [problem] = caught.value.problems
    assert problem.fix == "set data.tasks=null."
    load_recipe("tiny/sft", ["data.source=shards", "data.tasks=null"])
