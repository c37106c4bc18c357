"""From validation errors to problems that say what to do."""

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.errors import Problem
from common.registry import nearest
from recipes.yaml_loader import KeyPath, dotted

_OPENING = re.compile(r"^(Input|String|Tuple|Dictionary|List) should")
_HINTS = {
    "int_type": "write a whole number, without quotes or a decimal point.",
    "int_from_float": "write a whole number.",
    "float_type": "write a number, without quotes.",
    "bool_type": "write true or false.",
    "string_type": "write text; put it in quotes if it looks like a number.",
    "tuple_type": "write a list, such as [a, b].",
    "finite_number": "write a finite number.",
}


def explain(
    error: ValidationError, kind: type[BaseModel], where: Mapping[KeyPath, str], file: str
) -> list[Problem]:
    """Return one problem per validation error of a recipe of the model `kind`.

    `where` says where each given key stands; `file` is named for keys that were not given.
    """
    problems = []
    entries = error.errors(include_url=False)
    for entry in entries:
        if entry["type"] == "too_short" and _has_below(entries, entry["loc"]):
            continue  # pydantic drops wrong items of a list and then finds it too short
        path: KeyPath = tuple(part for part in entry["loc"] if part != "[key]")
        context = entry.get("ctx", {})
        if entry["type"] == "cross_field":
            parts = str(context["key"]).split(".")
            path = (*path, *(int(part) if part.isdigit() else part for part in parts))
            message, fix = str(context["message"]), str(context["fix"])
        elif entry["type"] == "extra_forbidden":
            message, fix = _unknown_key(kind, path)
        elif entry["type"] == "missing":
            message = "This required key is missing."
            fix = f"add it: {_description(kind, path)}"
        elif entry["type"] == "literal_error":
            message = f"Allowed: {str(context['expected']).replace(' or ', ', ')}."
            close = nearest(str(entry["input"]), _choices(str(context["expected"])))
            fix = f"did you mean `{close}`?" if close else "use one of the allowed values."
        elif entry["type"] == "string_pattern_mismatch":
            message = "This does not have the right form."
            fix = f"give a value for: {_description(kind, path)}"
        elif entry["type"] == "model_type":
            message = "This must be a mapping of keys."
            fix = f"give it these keys: {', '.join(fields_at(kind, path))}."
        else:
            message = _OPENING.sub("This must", entry["msg"]).rstrip(".") + "."
            fix = _HINTS.get(entry["type"]) or f"give a value for: {_description(kind, path)}"
        seen = None if entry["type"] == "missing" else show(_seen(entry, path))
        problems.append(Problem(_where(path, where) or file, dotted(path), message, fix, seen))
    return problems


def show(value: Any, limit: int = 60) -> str:
    """Return a value as one short printable line, in YAML's flow style."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def fields_at(kind: type[BaseModel], path: KeyPath) -> dict[str, FieldInfo]:
    """Return the keys that a recipe of this kind has at `path`; {} where keys are free."""
    model: type[BaseModel] | None = kind
    for part in path:
        if model is None:
            return {}
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        model = None if field is None else _model_in(field.annotation)
    return {} if model is None else dict(model.model_fields)


def known_keys(kind: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key of this kind, list items left out."""
    for name, field in kind.model_fields.items():
        yield (*prefix, name)
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from known_keys(inner, (*prefix, name))


def _unknown_key(kind: type[BaseModel], path: KeyPath) -> tuple[str, str]:
    *parent, key = path
    known = list(fields_at(kind, tuple(parent)))
    close = nearest(str(key), known)
    section = f"`{dotted(tuple(parent))}`" if parent else "a recipe"
    message = f"Unknown key. Keys of {section}: {', '.join(known)}."
    if close:
        return message, f"did you mean `{close}`?"
    elsewhere = [other for other in known_keys(kind) if other[-1] == key]
    if elsewhere:
        return message, f"move it: the key is `{dotted(elsewhere[0])}`."
    return message, "remove it."


def _description(kind: type[BaseModel], path: KeyPath) -> str:
    *parent, key = (part for part in path if not isinstance(part, int))
    field = fields_at(kind, tuple(parent)).get(str(key))
    return (field.description if field else None) or f"`{dotted(path)}`."


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside an annotation such as `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        for argument in get_args(annotation):
            model = _model_in(argument)
            if model is not None:
                return model
    return None


def _choices(expected: str) -> list[str]:
    """Split pydantic's list of allowed values: `'a', 'b' or 'c'`."""
    return [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")]


def _where(path: KeyPath, where: Mapping[KeyPath, str]) -> str | None:
    for length in range(len(path), 0, -1):
        if path[:length] in where:
            return where[path[:length]]
    return None


def _has_below(entries: Sequence[Mapping[str, Any]], place: KeyPath) -> bool:
    return any(len(e["loc"]) > len(place) and e["loc"][: len(place)] == place for e in entries)


def _seen(entry: Mapping[str, Any], path: KeyPath) -> Any:
    """Return the value at `path`; a cross-field error has its whole section as input."""
    value = entry["input"]
    for part in path[len(entry["loc"]) :] if entry["type"] == "cross_field" else ():
        if isinstance(part, int) and isinstance(value, list):
            value = value[part]
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value
