"""What every reward must do, whatever it measures: shipped ones and the example alike."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards import list_rewards
from rewards.checks import synthetic_pictures, try_rewards
from rewards.runner import RewardRunner, RewardSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_reward"
METADATA = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
RECORD = {"prompt": 'a circle and a sign that says "CAB"', "prompt_id": "1", "metadata": METADATA}
SPECS = [
    RewardSpec("geneval"),
    RewardSpec("ocr", args={"box": [0, 0.25, 1, 0.75]}),
    RewardSpec(f"{EXAMPLE}/warmth.py:warmth"),
]


def test_all_built_in_rewards_are_tested_here():
    built_in = {"geneval", "ocr"}
    assert built_in <= set(list_rewards())
    assert built_in <= {spec.use for spec in SPECS}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.use.rpartition(":")[2])
def test_synthetic_pictures_get_numbers(spec):
    [trial] = try_rewards([spec], [RECORD])
    assert trial.problems == ()
    assert len(trial.scores) == 4


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.use.rpartition(":")[2])
def test_scores_do_not_depend_on_batch_neighbours_or_order_and_inputs_stay_as_they_were(spec):
    pictures = [*synthetic_pictures(), Image.new("RGB", (48, 48), "red")]
    before = [np.asarray(picture).copy() for picture in pictures]
    prompts = [RECORD["prompt"]] * 5
    metadata = {"metadata": [METADATA] * 5}

    def totals(images, batch_size):
        with RewardRunner([spec], batch_size=batch_size) as runner:
            return [s.total for s in runner.score(images, prompts, metadata)]

    together = totals(pictures, 32)
    assert None not in together
    assert totals(pictures, 1) == pytest.approx(together, abs=1e-6)
    assert totals(pictures[::-1], 2) == pytest.approx(together[::-1], abs=1e-6)
    for picture, pixels in zip(pictures, before, strict=True):
        assert np.array_equal(np.asarray(picture), pixels)


def test_the_example_scores_warm_colors_higher():
    colors = [(255, 0, 0), (128, 128, 128), (0, 0, 255), (255, 128, 127)]
    pictures = [Image.new("RGB", (8, 8), color) for color in colors]
    spec = RewardSpec("warmth.py:warmth", args={"target": 1.0})
    with RewardRunner([spec], folder=EXAMPLE) as runner:
        scored = runner.score(pictures, [""] * 4)
    # 1 - |mean red - mean blue - 1|
    assert [s.parts["warmth"] for s in scored] == pytest.approx([1.0, 0.0, -1.0, 128 / 255])


def test_the_examples_recipe_is_valid_and_its_rewards_run():
    from recipes import load_recipe

    recipe = load_recipe(EXAMPLE / "recipe.yaml").recipe
    specs = [RewardSpec(f.use, f.weight, f.args, f.timeout_s) for f in recipe.rewards.functions]
    assert [trial.problems for trial in try_rewards(specs, [RECORD], EXAMPLE)] == [(), ()]
