"""Reward arguments on the command line: KEY=VALUE, the value read as YAML like in a recipe."""

from collections.abc import Sequence
from typing import Any


def parse(
    texts: Sequence[str], *, prefixed: Sequence[str] = (), option: str = "--arg "
) -> dict[str, dict[str, Any]]:
    """Return reward -> arguments. With `prefixed` names, each key is NAME.KEY, else NAME is "".

    `option` is what stands before them on the command line.
    """
    from common.errors import UsageError
    from recipes.yaml_loader import parse_yaml

    arguments: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name, dot, rest = key.partition(".") if prefixed else ("", ".", key)
        if not (equals and dot and rest):
            form = f"{prefixed[0]}.KEY=VALUE" if prefixed else "KEY=VALUE"
            raise UsageError(f"{option}{text}: not of the form {form}.\n    Fix: {option}{form}")
        if prefixed and name not in prefixed:
            raise UsageError(
                f"{option}{text}: no reward is called `{name}` here.\n"
                f"    Fix: begin with one of {', '.join(prefixed)}"
            )
        arguments.setdefault(name, {})[rest] = parse_yaml(value.encode(), f"{option}{key}").value
    return arguments
