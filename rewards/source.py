"""The code that a function's results depend on, as far as it lies beside the function."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def source_code(function: Callable[..., Any]) -> bytes:
    """Return the file that a function is written in, with the modules beside it that it imports.

    Those are the modules of its own package, or of its folder where that is no package, however
    deep the imports go. Installed libraries and computed imports are not seen. Empty if the
    function was not written in a file.
    """
    source = inspect.getsourcefile(inspect.unwrap(function))
    if not source or not Path(source).is_file():
        return b""
    start = Path(source).resolve()
    root = start.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    # A file of a package sees that package alone: beside it lie all that are installed.
    within = root.joinpath(*start.relative_to(root).parts[:1]) if root != start.parent else root
    texts: dict[Path, bytes] = {}
    pending = [start]
    while pending:
        file = pending.pop()
        if file not in texts:
            texts[file] = file.read_bytes()
            pending += [x for x in _imported(file, texts[file], root) if within in x.parents]
    others = sorted(texts.items() - {(start, texts[start])})
    return texts[start] + b"".join(str(x.relative_to(root)).encode() + text for x, text in others)


def _imported(file: Path, text: bytes, root: Path) -> Iterator[Path]:
    """Yield the files below `root` that a file's import statements name."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # no Python of ours can import it either
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            folder, names = root, [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = file.parents[node.level - 1] if node.level else root
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names):
            for depth in range(1, len(parts) + 1):
                path = folder.joinpath(*parts[:depth])
                yield from filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py"))
