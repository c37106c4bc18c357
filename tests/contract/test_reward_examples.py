"""What users copy works as it stands: README's reward, the guide's, and the example package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import main
from recipes.yaml_loader import parse_yaml
from rewards import load_reward
from rewards.detector import DETECTORS
from rewards.plugins import _BUILT_IN
from rewards.spec import spec_from

ROOT = Path(__file__).resolve().parents[2]


def blocks(page, heading):
    """The code blocks of a section of a Markdown page, by language, in order."""
    text = (ROOT / page).read_text("utf-8")
    section = re.split(r"\n## ", text.split(f"\n## {heading}\n", 1)[1], maxsplit=1)[0]
    found: dict[str, list[str]] = {}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL):
        found.setdefault(language, []).append(code)
    return found


@pytest.mark.parametrize(
    ("page", "heading"),
    [("README.md", "Your own reward"), ("docs/writing-rewards.md", "In one file")],
)
def test_the_reward_on_the_page_works_in_the_recipe_on_the_page(
    page, heading, tmp_path, monkeypatch, capsys
):
    code = blocks(page, heading)
    name = re.match(r"# (\w+\.py)\n", code["python"][0])[1]
    (tmp_path / name).write_text(code["python"][0])
    (tmp_path / "mine.yaml").write_text("extends: geneval-scenes\nname: mine\n" + code["yaml"][0])
    monkeypatch.chdir(tmp_path)
    assert main(["check", "mine.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ok"
    [tried] = [line.split() for line in lines if line.startswith("  warmth")]
    # Grey, a gradient, a red disc on white, noise: the disc alone is warm.
    scores = [float(score) for score in tried[1:5]]
    assert max(scores) == scores[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example package, installed by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "examples" / "reward_package", folder / "source")
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
        "--no-build-isolation", "--disable-pip-version-check", "--target", str(folder / "site"),
        str(folder / "source"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=200)
    return folder / "site"


def atelier(installed, folder, *arguments):
    code = "import sys; from cli.main import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "NO_COLOR": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_an_installed_reward_is_there_under_its_name(installed, tmp_path):
    assert "sharpness" in atelier(installed, tmp_path, "ls", "rewards").stdout.split()
    (tmp_path / "r.yaml").write_text(
        "extends: geneval-scenes\nname: r\n"
        "rewards: {functions: [{use: sharpness, workers: 1, args: {sharp: 0.2}}]}\n"
    )
    done = atelier(installed, tmp_path, "check", "r.yaml")
    assert done.returncode == 0, done.stderr
    tried = next(line for line in done.stdout.splitlines() if line.startswith("  sharpness"))
    grey, gradient, _, noise = map(float, tried.split()[1:5])
    assert (grey, noise) == (0, 1)
    assert 0 < gradient < 1


def table(heading):
    """The first column of the first table after a heading of docs/rewards.md."""
    text = (ROOT / "docs" / "rewards.md").read_text("utf-8").split(f"{heading}\n", 1)[1]
    rows = text.split("| --- |", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return sorted(re.match(r"\| `(\w+)` \|", row)[1] for row in rows)


def test_the_reward_page_has_a_row_for_every_reward_and_detector():
    assert table("# Rewards") == sorted(_BUILT_IN)
    assert table("### Detectors for photographs") == DETECTORS.names()


PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("rewards", "writing-rewards", "reward-serving")),
]


def entries(value):
    """Every mapping with the key `use` in the YAML of a page."""
    if isinstance(value, list):
        return [entry for item in value for entry in entries(item)]
    if not isinstance(value, dict):
        return []
    return [value] if "use" in value else entries(list(value.values()))


@pytest.mark.parametrize("page", PAGES)
def test_the_rewards_in_the_recipes_of_a_page_take_their_arguments(page):
    found = [
        entry
        for code in re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
        for entry in entries(parse_yaml(code.encode(), page).value)
    ]
    assert found, page
    for entry in found:
        spec_from(entry)
        if ".py:" not in entry["use"]:
            load_reward(entry["use"], **entry.get("args", {}))
