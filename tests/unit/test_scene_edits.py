"""Edits of the scene world: the edited scene is what the instruction asks for."""

import re

import numpy as np
import pytest

from common.scene_world import COLORS
from data.scene_edits import SceneEdits, sample_edit
from data.scenes import is_held_out, paint


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_edited_scene_is_what_the_instruction_asks_for(split):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(150):
        edit = sample_edit(rng, split)
        before = {o.label: o for o in edit.before.objects}
        after = {o.label: o for o in edit.after.objects}
        kind, rest = re.fullmatch(r"(make the|remove the|add an?) (.*)", edit.instruction).groups()
        seen.add(kind.split()[0])
        if kind == "make the":
            label, color = rest.split()
            assert before[label].color != after[label].color == color
            assert before[label].cell == after[label].cell
        elif kind == "remove the":
            label = rest
            assert label in before
            assert label not in after
        else:
            color, label = rest.split()
            assert kind == ("add an" if color == "orange" else "add a")
            assert label not in before
            assert after[label].color == color
        assert {k: v for k, v in before.items() if k != label} == {
            k: v for k, v in after.items() if k != label
        }
        assert not is_held_out(edit.before)
        assert is_held_out(edit.after) == (split == "held_out")
        assert all(o.color in COLORS for o in edit.after.objects)
    assert seen == {"make", "remove", "add"}


def test_added_objects_do_not_cover_others():
    rng = np.random.default_rng(1)
    for _ in range(200):
        cells = [o.cell for o in sample_edit(rng, "train").after.objects]
        if len(cells) == 2:
            assert max(abs(cells[0][0] - cells[1][0]), abs(cells[0][1] - cells[1][1])) >= 2


def test_an_edit_depends_on_seed_and_position_alone():
    one, other = SceneEdits(3), SceneEdits(4)
    sample = one[17]
    again = SceneEdits(3)[17]
    assert sample.caption == again.caption
    assert (sample.image == again.image).all()
    assert (sample.reference == again.reference).all()
    assert not np.array_equal(sample.image, sample.reference)
    assert any(one[p].caption != other[p].caption for p in range(5))
    assert sample.image.shape == paint(sample_edit(np.random.default_rng(0), "train").after).shape
