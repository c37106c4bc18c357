"""Curves in a terminal: braille lines and one-line sparklines."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the braille dots by row (from the top) and column."""

Point = tuple[float, float]


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the values as at most `width` blocks; neighbours are averaged to fit."""
    if not values:
        return ""
    columns = binned(values, min(width, len(values)))
    low, high = min(columns), max(columns)
    if high == low:
        return _BLOCKS[0] * len(columns)
    return "".join(_BLOCKS[round(7 * (value - low) / (high - low))] for value in columns)


def binned(values: Sequence[float], count: int) -> list[float]:
    """Return the means of `count` runs of neighbours of about equal length."""
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [fmean(values[a:b]) for a, b in pairwise(edges)]


def line_chart(
    line: Sequence[Point], dots: Sequence[Point], width: int, height: int, dot_style: str
) -> list[Text]:
    """Return a chart of `height` rows and an axis: a braille line, and dots in their own style.

    `width` counts the labels of the vertical axis too. Empty for no points.
    """
    points = [*line, *dots]
    if not points:
        return []
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if high == low:
        low, high = low - 0.5, high + 0.5
    labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
    margin = max(map(len, labels)) + 1
    columns = width - margin - 1

    def place(x: float, y: float, across: int, down: int) -> tuple[int, int]:
        column = (x - left) / ((right - left) or 1) * (across - 1)
        return round(column), round((high - y) / (high - low) * (down - 1))

    cells = [[0] * columns for _ in range(height)]
    for x, y in _filled(line, 2 * columns):
        column, row = place(x, y, 2 * columns, 4 * height)
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    marks = {place(x, y, columns, height) for x, y in dots}
    rows = []
    for number, label in enumerate(labels):
        text = Text(f"{label:>{margin}}│", style="dim")
        for column, bits in enumerate(cells[number]):
            if (column, number) in marks:
                text.append("●", style=f"not dim {dot_style}")
            else:
                text.append(chr(0x2800 + bits) if bits else " ", style="not dim")
        rows.append(text)
    first, last = f"step {left:g}", f"{right:g}"
    gap = max(1, columns - len(first) - len(last))
    rows.append(Text(f"{' ' * margin}└{first}{' ' * gap}{last}", style="dim"))
    return rows


def _filled(line: Sequence[Point], columns: int) -> list[Point]:
    """Points close enough on every stretch of the line that no column is left out."""
    if len(line) < 2:
        return list(line)
    span = (line[-1][0] - line[0][0]) or 1
    found: list[Point] = []
    for (x0, y0), (x1, y1) in pairwise(line):
        count = max(1, round(4 * columns * (x1 - x0) / span))
        found += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count)]
    return [*found, line[-1]]
