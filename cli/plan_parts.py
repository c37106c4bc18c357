"""What the plans of GRPO and of pretraining share: facts of memory, and how they look."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rl.memory import Memory, Sharding


class PlannedDevice(NamedTuple):
    """What a run would run on."""

    name: str
    capacity: int
    """In bytes."""
    is_gpu: bool


def device_of(wanted: str) -> PlannedDevice:
    """Return the device that `policy.device` means here; without a GPU, `cuda` is an H100."""
    from cli.machine import gpus, memory_bytes
    from rl.sizing import GPUS

    found = gpus() or [] if wanted != "cpu" else []
    if found:
        return PlannedDevice(*found[0], True)
    if wanted == "cuda":
        return PlannedDevice(*next(iter(GPUS.items())), True)
    return PlannedDevice("this machine", memory_bytes(), False)


def memory_row(memory: "Memory", sharding: "Sharding") -> dict[str, Any]:
    """Return what one GPU holds of a run that is spread in this way."""
    return {
        "gpus": sharding.gpus,
        "zero_stage": sharding.stage,
        "resident": memory.resident,
        "phases": memory.phases,
        "peak": memory.peak,
    }


def option(memory: "Memory", sharding: "Sharding") -> dict[str, Any]:
    """Return which GPUs hold a run that is spread in this way."""
    from rl.sizing import GPUS, fits

    return {
        "gpus": sharding.gpus,
        "zero_stage": sharding.stage,
        "peak": memory.peak,
        "fits": {name: fits(memory, size) for name, size in GPUS.items()},
    }


def verdict_on(
    device: PlannedDevice,
    alone: "Memory",
    change_that_fits: "Callable[[int], tuple[str, Memory] | None]",
) -> dict[str, Any]:
    """Return whether the device holds the run by itself and, if not, what would make it fit.

    `change_that_fits` gets the bytes that there are for the run.
    """
    from rl.sizing import LIBRARIES, fits

    libraries = 0 if device.is_gpu else LIBRARIES
    room = device.capacity - libraries
    change = None if fits(alone, room) else change_that_fits(room)
    return {
        "device": device.name,
        "capacity": device.capacity,
        "needs": alone.peak + libraries,
        "fits": fits(alone, room),
        "decided_by": alone.largest_phase,
        "fix": {"change": change[0], "needs": change[1].peak + libraries} if change else None,
    }


# --- on the screen -------------------------------------------------------------------------------


def show_steps(facts: dict[str, Any]) -> None:
    """Print what a run learns from that reads pictures."""
    from cli import console

    pictures = facts["steps"] * facts["batch_size"]
    console.say("work", style="bold")
    console.pairs(
        [
            ("steps", f"{facts['steps']:,}"),
            ("pictures", f"{pictures:,} ({facts['batch_size']} a step)"),
            ("source", facts["source"]),
        ]
    )


def show_flops(facts: dict[str, Any]) -> None:
    """Print the operations of a picture, stage by stage, and of a step."""
    from cli import console
    from rl.sizing import PEAK_FLOPS

    names = {"sampling": "sample tokens", "scoring": "score tokens", "diffusion": "diffusion head"}
    each = facts["flops_per_picture"]
    total = sum(each.values())
    console.say("operations per picture (products and convolutions, counted)", style="bold")
    rows = [
        (names.get(key, key), f"{operations(n):>10}  {n / total:4.0%}") for key, n in each.items()
    ]
    console.pairs([*rows, ("together", f"{operations(total):>10}")])
    if len(facts["memory"]) > 1:
        seconds = facts["flops_per_step"] / PEAK_FLOPS
        console.say(
            f"  a step is {operations(facts['flops_per_step'])}: at least {seconds:.0f} s on one "
            "H100 or H200 at its peak"
        )


def show_memory(rows: list[dict[str, Any]]) -> None:
    """Print what takes memory, a column for each way to spread the run."""
    from cli import console

    kept, phases = rows[0]["resident"], rows[0]["phases"]
    if len(rows) == 1:
        console.say("memory", style="bold")
        console.pairs(
            [
                *((name, console.size(count)) for name, count in kept.items()),
                *((f"+ {name}", f"{console.size(n)} (estimate)") for name, n in phases.items()),
                ("peak", f"{console.size(rows[0]['peak'])} (one + at a time)"),
            ]
        )
        return
    counts = [f"{row['gpus']} GPU" + "s" * (row["gpus"] > 1) for row in rows]
    stages = [f"ZeRO-{row['zero_stage']}" if row["zero_stage"] else "" for row in rows]
    console.say(table_line("memory of one GPU, GB", counts, indent=""), style="bold")
    console.say(table_line("", stages), style="bold")
    table = [(name, [row["resident"].get(name, 0) for row in rows]) for name in kept]
    table += [
        (f"+ {name} (estimate)", [row["phases"].get(name, 0) for row in rows]) for name in phases
    ]
    table.append(("peak: one + at a time", [row["peak"] for row in rows]))
    for name, values in table:
        console.say(table_line(name, [gigabytes(value) for value in values]))


def show_options(options: list[dict[str, Any]], key: str, titles: dict[Any, str]) -> None:
    """Print the smallest GPU that holds each option, a line for each value of `key`."""
    from cli import console
    from rl.sizing import GPUS

    console.say("fits on (peak in GB, a tenth left free)", style="bold")
    for value, title in titles.items():
        cells = []
        for one in options:
            if one[key] == value:
                on = next((name for name, holds in one["fits"].items() if holds), "neither")
                cells.append(f"{one['peak'] / 1e9:.0f} {on}")
        console.say(table_line(title, cells))
    sizes = ", ".join(f"{name} {size / 1e9:.0f} GB" for name, size in GPUS.items())
    console.say(f"  the smallest of {sizes} that holds the peak")


def table_line(name: str, cells: list[str], indent: str = "  ") -> str:
    """A row of a table whose columns fit a terminal."""
    return f"{indent}{name}".ljust(24) + "".join(f" {cell:>10}" for cell in cells).rstrip()


def show_verdict(verdict: dict[str, Any]) -> None:
    """Print whether it fits, and the change with which it would."""
    from cli import console

    needs = f"{gigabytes(verdict['needs'])} of {gigabytes(verdict['capacity'])} GB"
    where = verdict["device"]
    if verdict["fits"]:
        console.say(f"fits: {needs} of {where}", style="green")
        return
    fix = verdict["fix"]
    if fix:
        what = f"{fix['change']} ({gigabytes(fix['needs'])} GB)"
    else:
        what = "use a device with more memory."
    console.say(f"does not fit: {needs} of {where} for {verdict['decided_by']}", style="yellow")
    console.say(f"    Fix: {what}", style="green")


def gigabytes(count: float) -> str:
    """Such as `51.6` or `1,960`."""
    return f"{count / 1e9:.3g}" if count < 999.5e9 else f"{count / 1e9:,.0f}"


def operations(count: float) -> str:
    """Such as `64.6 TFLOP`."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"
