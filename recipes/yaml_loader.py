"""YAML for recipes: PyYAML's safe parser with the YAML 1.2 core types and limits on its input.

Stock `yaml.safe_load` reads `1e-5` as a string and `no` as false, keeps the last of two equal keys
and expands alias bombs. Here the parser only delivers its node tree; the values are built from that
tree under a budget, and the line of every key is kept.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from common.errors import Problem, RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 10_000
"""Keys and values together, each alias counted at its full size."""

KeyPath = tuple[str | int, ...]
"""A place in the document: ("rewards", "functions", 0, "weight")."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|false")
_INDENT_TAB = re.compile(r"^ *\t", re.MULTILINE)
_LARGEST_INT = 2**63 - 1


class _Stop(Exception):
    """The document cannot be read any further."""

    def __init__(self, line: int | None, message: str, fix: str) -> None:
        self.line, self.message, self.fix = line, message, fix


class _Parser(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core types and a bound on its own recursion."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Compose one node, as the base class does, within the limits."""
        line = self.peek_event().start_mark.line + 1
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _Stop(line, f"The file has more than {MAX_NODES:,} values.", "split the recipe.")
        if self._depth >= MAX_DEPTH:
            raise _too_deep(line)
        self._depth += 1
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes exactly the strings which this module would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out, so that a resolved recipe has no anchors."""
        return True


def _represent_text(dumper: RecipeDumper, text: str) -> Node:
    # PyYAML writes some line separators as they are, and reads them back as spaces.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


RecipeDumper.add_representer(str, _represent_text)

for _kind in (_Parser, RecipeDumper):
    _kind.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in (
        ("null", _NULL, ["~", "n", "N", ""]),
        ("bool", _BOOL, list("tf")),
        ("int", _INT, list("-+0123456789")),
        ("float", _FLOAT, list("-+.0123456789")),
    ):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})\\Z"), _first
        )


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML text."""

    value: Any
    """None, bool, int, float, str, list or dict with string keys."""
    lines: dict[KeyPath, int]
    """Line (from 1) of every key and list item."""
    problems: list[Problem]
    """What is wrong with single keys, such as a key that stands twice."""


def parse_yaml(data: bytes, name: str) -> Document:
    """Parse `data`, called `name` in messages; an empty text has the value None.

    Raises RecipeError when the text as a whole cannot be read: not UTF-8, larger than 1 MB, deeper
    than 32 levels, more than 10,000 values, tabs as indentation, or not YAML.
    """
    try:
        parser = _Parser(_decode(data))
        node = parser.get_single_node()
        builder = _Builder(name)
        value = None if node is None else builder.build(node, ())
    except _Stop as stop:
        where = name if stop.line is None else f"{name}:{stop.line}"
        problem = Problem(where, "", stop.message, stop.fix)
        raise RecipeError(str(problem), [problem]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}:{mark.line + 1}"
        text = ", ".join(part for part in (error.context, error.problem) if part)
        problem = Problem(where, "", f"This is not valid YAML: {text}.", "correct this line.")
        raise RecipeError(str(problem), [problem]) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets chr() and int() fail on absurd escapes and version directives.
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = Problem(name, "", f"This is not valid YAML: {first}.", "write it as plain text.")
        raise RecipeError(str(problem), [problem]) from None
    return Document(value, builder.lines, builder.problems)


def dotted(path: KeyPath) -> str:
    """Return a path as the dotted key that overrides use."""
    return ".".join(str(part) for part in path)


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        size = f"{len(data) / 1e6:.1f} MB"
        raise _Stop(None, f"The file has {size}; a recipe has at most 1 MB.", "check the path.")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise _Stop(1, "The file starts with a byte order mark.", "save it as UTF-8 without BOM.")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise _Stop(line, "There is a NUL byte, so this is not a text file.", "check the path.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _Stop(line, "The file is not UTF-8.", "save it as UTF-8.") from None
    tab = _INDENT_TAB.search(text)
    if tab:
        line = text.count("\n", 0, tab.start()) + 1
        raise _Stop(line, "The line is indented with a tab.", "indent with spaces only.")
    return text


def _too_deep(line: int) -> _Stop:
    return _Stop(line, f"The file is nested deeper than {MAX_DEPTH} levels.", "flatten it.")


class _Builder:
    """Turns nodes into values; wrong keys are collected, wrong values stop it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._count = 0

    def build(self, node: Node, path: KeyPath) -> Any:
        """Return the value of `node`, which stands at `path`."""
        line = node.start_mark.line + 1
        self._count += 1
        if self._count > MAX_NODES:
            raise _Stop(line, f"Aliases expand to more than {MAX_NODES:,} values.", "remove them.")
        if len(path) > MAX_DEPTH:
            raise _too_deep(line)
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, ScalarNode):
            return _scalar(node, tag, line)
        if isinstance(node, SequenceNode) and tag == "seq":
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, MappingNode) and tag == "map":
            return self._mapping(node, path)
        raise _bad_tag(node.tag, line)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            is_text = isinstance(key_node, ScalarNode) and key_node.tag.endswith(":str")
            key = key_node.value if is_text else None
            if key is None:
                shown = key_node.value if isinstance(key_node, ScalarNode) else "a list or mapping"
                self._problem(
                    line, dotted(path), f"A key must be text, not {shown!r}.", "quote it."
                )
            elif key == "<<":
                message = "Merge keys (`<<`) are not part of YAML 1.2."
                self._problem(line, dotted(path), message, "use `extends:`.")
            elif key in values:
                first = self.lines[(*path, key)]
                message = f"The key stands twice; it is in line {first} already."
                self._problem(line, dotted((*path, key)), message, "keep one of the two.")
            else:
                _check_text(key, line)
                self.lines[(*path, key)] = line
                values[key] = self.build(value_node, (*path, key))
        return values

    def _problem(self, line: int, key: str, message: str, fix: str) -> None:
        self.problems.append(Problem(f"{self.name}:{line}", key, message, fix))


def _scalar(node: ScalarNode, tag: str, line: int) -> Any:
    text: str = node.value
    if tag == "str":
        _check_text(text, line)
        return text
    if tag == "null" and _NULL.fullmatch(text):
        return None
    if tag == "bool" and _BOOL.fullmatch(text):
        return text == "true"
    if tag == "int" and _INT.fullmatch(text):
        return _integer(text, line)
    if tag == "float" and (_FLOAT.fullmatch(text) or _INT.fullmatch(text)):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if tag in ("null", "bool", "int", "float"):
        raise _Stop(line, f"{text[:40]!r} is not a {tag}.", f"remove the tag `!!{tag}`.")
    raise _bad_tag(node.tag, line)


def _integer(text: str, line: int) -> int:
    if len(text) > 40:
        raise _Stop(line, "This number has more than 40 digits.", "use a smaller number.")
    base = 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10
    value = int(text, base)
    if abs(value) > _LARGEST_INT:
        raise _Stop(line, f"{value} does not fit into 64 bits.", "use a smaller number.")
    return value


def _check_text(text: str, line: int) -> None:
    """Refuse escapes that no file name or terminal can take."""
    if "\0" in text or any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise _Stop(line, "The text holds a NUL or half a character.", "remove the escape.")


def _bad_tag(tag: str, line: int) -> _Stop:
    shown = tag.replace("tag:yaml.org,2002:", "!!")
    return _Stop(line, f"The tag `{shown}` is not allowed in a recipe.", "remove the tag.")
