"""The templates of pages that are written: reports, galleries, model cards."""

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def environment(*, autoescape: bool, **filters: Callable[..., object]) -> Environment:
    """Return what loads templates, in which a name without a value is an error.

    With `autoescape` every value is text in HTML; Markdown has a filter of its own for that.
    """
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= filters
    return found
