"""Finding and calling reward functions: names, files, entry points, arguments, columns."""

import importlib
import inspect
import subprocess
import sys

import pytest
from PIL import Image

from common.errors import RewardError
from rewards import list_rewards, load_reward, plugins, reward
from rewards.runner import RewardRunner, RewardSpec

PICTURES = [Image.new("RGB", (4, 4)) for _ in range(2)]
PROMPTS = ["a", "b"]


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return path


def test_importing_rewards_is_light():
    code = (
        "import sys, rewards; rewards.list_rewards(); heavy = {'torch', 'cv2', 'rapidocr', "
        "'onnxruntime', 'transformers', 'numpy'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scoring_needs_no_torch():
    code = (
        "import sys; from PIL import Image; from rewards import load_reward\n"
        "md = {'tag': 'x', 'include': [{'class': 'circle', 'count': 1}]}\n"
        "[score] = load_reward('geneval')([Image.new('RGB', (48, 48))], ['p'], metadata=[md])\n"
        "print(score.value)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.0", "False"]


def test_only_declared_columns_are_passed():
    @reward(name="p_declared")
    def declared(images, metadata, scale=1.0):
        return [m * scale for m in metadata]

    call = load_reward("p_declared", scale=3)
    assert call(PICTURES, PROMPTS, metadata=[1, 2], prompt_id=["x", "y"]) == [3, 6]


def test_a_column_fills_a_parameter_that_has_a_default_and_an_argument_outranks_it():
    @reward(name="p_default")
    def with_default(images, target=0):
        return target

    assert load_reward("p_default")(PICTURES, PROMPTS, target=[1, 2]) == [1, 2]
    assert load_reward("p_default", target=7)(PICTURES, PROMPTS, target=[1, 2]) == 7


def test_a_column_never_fills_an_option():
    @reward(name="p_option")
    def with_option(images, metadata, *, strict=False, **columns):
        return [strict, sorted(columns)]

    columns = {"metadata": [1, 2], "strict": [3, 4], "tag": [5, 6]}
    assert load_reward("p_option")(PICTURES, PROMPTS, **columns) == [False, ["prompts", "tag"]]
    assert load_reward("p_option", strict=7)(PICTURES, PROMPTS, **columns)[0] == 7
    assert not load_reward("p_option").sees("strict")
    assert load_reward("p_option").sees("tag")


def test_an_option_without_a_value_is_an_error_at_once():
    @reward(name="p_needed")
    def needed(images, *, weights):
        return []

    with pytest.raises(RewardError, match=r"needs the argument `weights`.*under `args`"):
        load_reward("p_needed")


def test_no_option_of_a_built_in_reward_can_be_set_by_a_data_set():
    args = {
        "weights": "w", "head": "h", "servers": [], "base_url": "http://127.0.0.1/v1", "model": "m",
    }  # fmt: skip
    columns = {"images", "prompts", "metadata", "source", "columns"}
    for name in plugins._BUILT_IN:
        known = inspect.signature(load_any(name, args).function).parameters
        for option in known.keys() - columns:
            assert not load_any(name, args).sees(option), f"{name}.{option}"


def load_any(name, args):
    """Load a reward with those of the arguments that it must have."""
    known = inspect.signature(_place(name)).parameters
    return load_reward(name, **{k: v for k, v in args.items() if k in known})


def _place(name):
    module, _, function = plugins._BUILT_IN[name].partition(":")
    return getattr(importlib.import_module(module), function)


def test_double_star_receives_all_columns():
    @reward(name="p_all")
    def everything(prompts, **columns):
        return sorted(columns)

    assert load_reward("p_all")(PICTURES, PROMPTS, metadata=[1, 2], tag=[3, 4]) == [
        "images",
        "metadata",
        "tag",
    ]


def test_a_trl_reward_function_works_unchanged(tmp_path):
    path = write(
        tmp_path,
        "def size_reward(prompts, completions, **kwargs):\n"
        "    return [c.width + len(p) for p, c in zip(prompts, completions)]\n",
    )
    call = load_reward(f"{path}:size_reward")
    assert call.name == "size_reward"
    assert call(PICTURES, PROMPTS, metadata=[1, 2]) == [5, 5]


def test_a_misspelt_argument_is_refused_even_with_double_star():
    @reward(name="p_args")
    def with_args(images, target=0.5, **columns):
        return [target]

    with pytest.raises(RewardError, match=r"`tarjet`.*`target`"):
        load_reward("p_args", tarjet=1)
    with pytest.raises(RewardError, match="`images`"):
        load_reward("p_args", images=1)


def test_a_positional_only_parameter_is_refused():
    @reward(name="p_positional")
    def positional(images, /):
        return []

    with pytest.raises(RewardError, match="by position"):
        load_reward("p_positional")


def test_names():
    assert {"geneval", "ocr"} <= set(list_rewards())
    with pytest.raises(RewardError, match=r"`genevall`.*`geneval`"):
        load_reward("genevall")
    with pytest.raises(RewardError, match="twice"):

        @reward(name="geneval")
        def mine(images):
            return []


def test_defining_a_reward_again_replaces_it_but_another_may_not_take_its_name():
    def define(value):
        @reward(name="p_again")
        def again(images):
            return value

    define(1)
    define(2)
    assert load_reward("p_again")(PICTURES, PROMPTS) == 2
    with pytest.raises(RewardError, match="twice"):

        @reward(name="p_again")
        def other(images):
            return 3


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_read_again_after_an_edit(tmp_path):
    path = write(tmp_path, "def f(images):\n    return 1\n")
    assert load_reward(f"{path}:f")(PICTURES, PROMPTS) == 1
    assert load_reward(f"{path}:f").function is load_reward(f"{path}:f").function
    write(tmp_path, "def f(images):\n    return 2\n")
    assert load_reward(f"{path}:f")(PICTURES, PROMPTS) == 2


def test_a_decorated_function_in_a_file_keeps_its_name_and_traits(tmp_path):
    path = write(
        tmp_path,
        "from rewards import reward\n"
        "@reward(name='p_file', whole_batch=True)\n"
        "def f(images):\n    return [1.0]\n",
    )
    for _ in range(2):
        call = load_reward(f"{path}:f")
        assert (call.name, call.whole_batch) == ("p_file", True)
    assert "p_file" not in list_rewards()


def test_two_files_of_one_name_are_two_modules_and_may_name_their_rewards_alike(tmp_path):
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        code = "from rewards import reward\n@reward(name='geneval')\n"
        write(tmp_path / str(value), f"{code}def f(images):\n    return {value}\n")
    calls = [load_reward(f"{tmp_path}/{value}/mine.py:f") for value in (1, 2)]
    assert [call(PICTURES, PROMPTS) for call in calls] == [1, 2]


@pytest.mark.parametrize(
    ("text", "name", "word"),
    [
        ("def warmth(images): pass", "warmht", "`warmth`"),
        ("warmth = 3", "warmth", "int"),
        ("class warmth: pass", "warmth", "type"),
        ("import functools\nwarmth = functools.partial(print)", "warmth", "partial.*function"),
        ("\n1 / 0", "warmth", "fails in line 2 when run: ZeroDivisionError"),
        ("from rewards import reward\n\n@reward\ndef warmth(images): pass", "warmth", "in line 3"),
        ("def (", "warmth", "SyntaxError"),
        ("raise SystemExit(3)", "warmth", "SystemExit: 3"),
    ],
)
def test_a_bad_file_is_explained(tmp_path, text, name, word):
    path = write(tmp_path, text)
    with pytest.raises(RewardError, match=word):
        load_reward(f"{path}:{name}")


def test_a_missing_file_is_named():
    with pytest.raises(RewardError, match=r"nowhere\.py.*Fix"):
        load_reward("nowhere.py:f")


# --- entry points ---------------------------------------------------------------------------------


def test_an_installed_package_offers_rewards(tmp_path, monkeypatch):
    write(tmp_path, "def plug(images):\n    return [0.25] * len(images)\n", "p_package.py")
    info = tmp_path / "p_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: p-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[atelier.rewards]\np_plug = p_package:plug\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "p_plug" in list_rewards()
    call = load_reward("p_plug")
    assert call.name == "p_plug"
    assert call(PICTURES, PROMPTS) == [0.25, 0.25]


@pytest.mark.parametrize("workers", [0, 1])
def test_modules_beside_a_reward_file_are_found_also_late(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"beside{workers}.py").write_text("HALF = 0.5\n")
    (tmp_path / f"late{workers}.py").write_text("TWO = 2\n")
    (tmp_path / "a.py").write_text(
        f"import beside{workers} as beside\n\n\ndef f(images):\n    import late{workers} as late\n"
        "    return [beside.HALF * late.TWO] * len(images)\n"
    )
    with RewardRunner([RewardSpec(f"{tmp_path}/a.py:f", workers=workers)]) as runner:
        [one] = runner.score([Image.new("RGB", (8, 8))], [""])
    assert one.total == 1.0


@pytest.mark.parametrize("pictures", [None, 5, "mask", [5]])
def test_pictures_that_are_no_list_of_columns_are_refused_at_load(pictures):
    with pytest.raises(RewardError, match=r"pictures is .* write a list"):
        load_reward("remote", servers=["http://127.0.0.1:1"], pictures=pictures)
