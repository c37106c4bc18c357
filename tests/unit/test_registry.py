"""Names, plug-ins and the nearest spelling."""

from importlib.metadata import EntryPoint

import pytest

from common import registry as module
from common.errors import RewardError
from common.registry import Registry, nearest


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("learning_rte", ["learning_rate", "steps"], "learning_rate"),
        ("GenEval", ["geneval", "ocr"], "geneval"),
        ("zzz", ["geneval", "ocr"], None),
        ("x", [], None),
    ],
)
def test_nearest(name, known, expected):
    assert nearest(name, known) == expected


def test_places_are_imported_when_asked_and_objects_kept():
    registry = Registry("reward", error=RewardError)
    registry.add("join", "os.path:join")
    registry.add("own", len)
    registry.add("broken", "no_such_module:x")
    import os.path

    assert registry.get("join") is os.path.join
    assert registry.get("own") is len
    assert registry.names() == ["broken", "join", "own"]
    with pytest.raises(ModuleNotFoundError):
        registry.get("broken")


def test_unknown_and_double_names():
    registry = Registry("reward", error=RewardError)
    registry.add("geneval", len)
    with pytest.raises(RewardError, match="Did you mean `geneval`"):
        registry.get("genevl")
    with pytest.raises(RewardError, match="twice"):
        registry.add("geneval", max)


def test_a_plug_in_is_found_and_cannot_take_a_built_in_name(monkeypatch):
    points = [
        EntryPoint("warmth", "os.path:join", "atelier.rewards"),
        EntryPoint("geneval", "os.path:join", "atelier.rewards"),
        EntryPoint("own", "os.path:join", "atelier.rewards"),
    ]
    monkeypatch.setattr(module, "entry_points", lambda group: points)
    registry = Registry("reward", group="atelier.rewards", error=RewardError)
    registry.add("geneval", "os.path:split")
    registry.add("own", len)
    import os.path

    assert registry.names() == ["geneval", "own", "warmth"]
    assert registry.get("warmth") is os.path.join
    assert registry.get("geneval") is os.path.split
    assert registry.get("own") is len
