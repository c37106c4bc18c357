"""Start-up: importing `recipes` and `atelier --help`, against a bare import of pydantic and typer.

    python -m benchmarks.startup [--turns 5]

Fresh processes, wall time of the child in user and system mode. The limits are absolute: 300 ms
for `import recipes` and 500 ms for `--help`. The ratios say how much ours adds to the libraries
that it cannot do without, which holds on a slower machine too.
"""

import resource
import statistics
import subprocess
import sys

from benchmarks.timing import Ratio, main, scatter

LIMITS = {"recipes": 0.300, "help": 0.500}
COMMANDS = {
    "python": ["-c", "pass"],
    "pydantic": ["-c", "import pydantic, yaml"],
    "recipes": ["-c", "import recipes"],
    "typer": ["-c", "import typer, rich.console, rich.table, rich.panel"],
    "help": ["-m", "cli", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """Return the CPU seconds of one fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ratios(turns: int) -> list[Ratio]:
    """Return what share of the time is the libraries'; the details give milliseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(turns + 1):
        for name, arguments in COMMANDS.items():
            once = cpu_seconds(arguments)
            if turn:  # the first turn writes the byte code
                seconds[name].append(once)
    rows = []
    for ours, library in (("recipes", "pydantic"), ("help", "typer")):
        turn_ratios = [a / b for a, b in zip(seconds[library], seconds[ours], strict=True)]
        spent = statistics.median(seconds[ours])
        kept = "within" if spent < LIMITS[ours] else "ABOVE"
        rows.append(
            Ratio(
                f"start-up: {ours} against {library} alone",
                statistics.median(turn_ratios),
                scatter(turn_ratios),
                f"{1000 * spent:.0f} ms, {kept} {1000 * LIMITS[ours]:.0f} ms",
            )
        )
    return rows


if __name__ == "__main__":
    main(ratios, __doc__)
