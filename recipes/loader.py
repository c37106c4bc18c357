"""Load a recipe: read the files it extends, apply overrides, validate, remember origins."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from common.errors import Problem, RecipeError
from common.registry import nearest
from recipes.explain import explain, show
from recipes.merge import Tree
from recipes.schema import KINDS, Recipe
from recipes.shipped import display_path, shipped_recipes
from recipes.yaml_loader import MAX_BYTES, Document, KeyPath, RecipeDumper, dotted, parse_yaml

_OVERRIDE = re.compile(r"([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A valid recipe and where each of its values comes from."""

    recipe: Recipe
    provenance: dict[str, str]
    """Dotted key of every value -> "file.yaml:12", "override" or "default"."""
    files: tuple[Path, ...]
    """The recipe's own file, then the one it extends, and so on."""


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe file (ends with .yaml or .yml) or a shipped recipe by its name.

    `overrides` are texts such as "train.steps=40", "policy.lora=null" or
    "rewards.functions.0.weight=0.5"; their values are read as YAML. Raises RecipeError with all
    problems that were found; nothing else escapes, whatever the files hold.
    """
    first = _locate(str(path_or_name), None)
    layers = _layers(first)
    problems: list[Problem] = []
    tree = Tree()
    for file, document in reversed(layers):
        problems += document.problems
        tree.merge(document.value, document.lines, display_path(file))
    for text in overrides:
        problems += _override(tree, text)
    name = display_path(first)
    named = tree.value.get("kind", "grpo")  # without a kind, the commonest finds what else is wrong
    if isinstance(named, str) and named in KINDS:
        kind = KINDS[named]
        try:
            recipe = kind.model_validate(tree.value)
        except ValidationError as error:
            problems += explain(error, kind, tree.origins, name)
    else:
        problems.append(_unknown_kind(tree, name))
    if problems:
        raise _report(name, problems)
    provenance = {
        dotted(path): tree.origins.get(path, "default")
        for path in _leaves(recipe.model_dump(mode="json"), ())
    }
    return LoadedRecipe(recipe, provenance, tuple(file for file, _ in layers))


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe with all its values as YAML that `load_recipe` reads to the same recipe."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True
    )


def _layers(first: Path) -> list[tuple[Path, Document]]:
    """Return the recipe's file and those it extends, nearest first, without `extends` in them."""
    layers: list[tuple[Path, Document]] = []
    file: Path | None = first
    while file is not None:
        name = display_path(file)
        document = parse_yaml(_read(file), name)
        if not isinstance(document.value, dict):
            seen = None if document.value is None else show(document.value)
            raise _single(
                name, "", "A recipe is a mapping of keys.", "start from `atelier new`.", seen
            )
        layers.append((file, document))
        parent = document.value.pop("extends", None)
        line = document.lines.pop(("extends",), None)
        if line is None:
            break
        where = f"{name}:{line}"
        if not isinstance(parent, str):
            message = "This must be the path or the name of one recipe."
            raise _single(where, "extends", message, "remove the key or name one.", show(parent))
        file = _locate(parent, (file, where))
        if any(file == seen_file for seen_file, _ in layers):
            chain = " -> ".join(display_path(each) for each in [f for f, _ in layers] + [file])
            message = f"The recipes extend each other in a circle: {chain}."
            raise _single(where, "extends", message, "remove this line.", show(parent))
    return layers


def _locate(text: str, base: tuple[Path, str] | None) -> Path:
    """Find a recipe by path or shipped name; `base` is the file that extends it and the line."""
    shipped = shipped_recipes()
    where, key = (text, "") if base is None else (base[1], "extends")
    seen = None if base is None else show(text)
    if text.endswith((".yaml", ".yml")) and text.isprintable():
        folder = Path() if base is None else base[0].parent
        try:
            file = (folder / text).expanduser().resolve()
            found = file.is_file()
        except (OSError, RuntimeError) as error:  # name too long, a loop of links, no such user
            raise _single(where, key, f"{error}.", "check the path.", seen) from None
        if found:
            return file
        stem = text.removesuffix(".yaml").removeprefix("recipes/")
        message = f"There is no file {file}." if "/" in text else f"There is no file {text} here."
        fix = f"use the shipped recipe `{stem}`." if stem in shipped else "check the path."
        raise _single(where, key, message, fix, seen)
    if text in shipped:
        return shipped[text]
    close = nearest(text, shipped)
    message = "There is no shipped recipe of that name, and a file must end with .yaml."
    fix = f"did you mean `{close}`?" if close else "list the names with `atelier ls recipes`."
    shown = where if text.isprintable() or base else show(text)
    raise _single(shown, key, message, fix, seen)


def _read(file: Path) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        message = f"The file cannot be read: {error.strerror}."
        raise _single(display_path(file), "", message, "check its permissions.") from None


def _override(tree: Tree, text: str) -> list[Problem]:
    """Apply one override and return what is wrong with it."""
    where = f"override {show(text)}"
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        message = "An override has the form key=value, such as train.steps=40."
        return [Problem(where, "", message, "write the dotted key, `=` and the value.")]
    key, raw = match.groups()
    if not raw.strip():
        return [Problem(where, key, "There is no value after `=`.", f"for null, write {key}=null.")]
    try:
        document = parse_yaml(raw.encode("utf-8", "surrogatepass"), where)
    except RecipeError as error:
        return list(error.problems)
    if key == "extends":
        message = "`extends` is read from files only."
        return [Problem(where, key, message, "name the other recipe instead.")]
    if document.problems:
        return document.problems
    return tree.set(tuple(key.split(".")), document.value, where)


def _unknown_kind(tree: Tree, name: str) -> Problem:
    seen = tree.value["kind"]
    close = nearest(str(seen), KINDS)
    message = f"Allowed: {', '.join(KINDS)}."
    fix = f"did you mean `{close}`?" if close else "use one of the allowed values."
    return Problem(tree.origins.get(("kind",), name), "kind", message, fix, show(seen))


def _leaves(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Yield the path of every value; a list of plain values counts as one."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path


def _single(where: str, key: str, message: str, fix: str, seen: str | None = None) -> RecipeError:
    problem = Problem(where, key, message, fix, seen)
    return RecipeError(str(problem), [problem])


def _report(name: str, problems: Sequence[Problem]) -> RecipeError:
    problems = sorted(problems, key=_reading_order)
    if len(problems) == 1:
        return RecipeError(str(problems[0]), problems)
    text = "\n\n".join(str(problem) for problem in problems)
    return RecipeError(f"{name} has {len(problems)} problems.\n\n{text}", problems)


def _reading_order(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.where, 0)
