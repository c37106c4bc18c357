"""How a step's cost grows with group size, tokens a picture, vocabulary and picture size.

    python -m benchmarks.growth [--turns 3] [--write]

Random weights at the shipped tiny policy's size, one thread, CPU seconds, median over turns. One
quantity doubles while the others stay at 16 pictures, 6x6 tokens, 512 codes and 48 pixels; every
stage of a step is timed and the growth is fitted as seconds = c * n^e over the last three points
(small sizes measure overhead). `memory` is the peak of an update's tensors beside the weights.
--write makes benchmarks/results/growth.json, growth.md and docs/images/growth.svg.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.machine import machine
from benchmarks.timing import take_turns
from common.atomic import write_text
from policy.connector import Connector
from policy.diffusion import sample_latents
from policy.sampling import ImageTokenSampler, Sampling
from policy.tiny import tiny_autoencoder, tiny_language_model
from rl.image_head import add_image_head

RESULTS = Path(__file__).parent / "results"
PLOT = Path("docs/images/growth.svg")
BASE = {"pictures": 16, "tokens": 36, "codes": 512, "side": 48}
POINTS = {
    "pictures": (8, 16, 32, 64),
    "tokens": (16, 36, 64, 144),
    "codes": (512, 2048, 8192, 32_768),
    "side": (48, 64, 96, 128),
}
NAMES = {
    "pictures": "pictures of a step",
    "tokens": "tokens a picture",
    "codes": "image tokens in the vocabulary",
    "side": "pixels a side",
}
TEXT, PROMPT, WIDTH, STEPS = 363, 14, 128, 2
STAGES = ("rollout", "score", "render", "update")


class Step:
    """The stages of a step at given sizes, each callable by itself."""

    def __init__(self, pictures: int, tokens: int, codes: int, side: int) -> None:
        torch.manual_seed(0)
        self.pictures, self.tokens, self.latent = pictures, tokens, side // 8
        self.model = tiny_language_model(TEXT + codes, pad_id=0, eos_id=0).eval()
        self.sampler = ImageTokenSampler(self.model, TEXT, codes, tokens, 0)
        add_image_head(self.model, TEXT, codes, 1.0)
        self.connector = Connector(WIDTH, WIDTH)
        self.head = SanaTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=3,
            num_cross_attention_heads=4,
            cross_attention_head_dim=32,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
            mlp_ratio=2.0,
            sample_size=self.latent,
        ).eval()
        self.vae: AutoencoderDC = tiny_autoencoder().eval()
        self.ids = torch.cat(
            [
                torch.ones(pictures, PROMPT, dtype=torch.int64),
                TEXT + torch.randint(codes, (pictures, tokens)),
            ],
            dim=1,
        )
        self.hidden = torch.randn(pictures, 1 + tokens, WIDTH)
        self.noise = torch.randn(pictures, 16, self.latent, self.latent)

    def rollout(self) -> None:
        """Sample all pictures of one prompt."""
        self.sampler.sample([[1] * PROMPT], self.pictures, Sampling(), list(range(self.pictures)))

    @torch.no_grad()
    def score(self) -> None:
        """One teacher-forced pass."""
        self.model(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), image_tokens=self.tokens
        )

    @torch.no_grad()
    def render(self) -> None:
        """Two Euler steps without guidance, and the autoencoder."""
        latents = sample_latents(
            self.head, {}, self.connector(self.hidden), self.hidden, self.noise,
            steps=STEPS, guidance=1.0,
        )  # fmt: skip
        self.vae.decode(latents)

    def update(self) -> None:
        """Forward and backward pass."""
        out = self.model(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), image_tokens=self.tokens
        )
        out.log_probs.mean().backward()
        self.model.zero_grad(set_to_none=True)


def measure(turns: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every quantity: its value, seconds of the stages, MB of the update."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for quantity, values in POINTS.items():
        for value in values:
            step = Step(**(BASE | {quantity: value}))
            stages: dict[str, Callable[[], None]] = {name: getattr(step, name) for name in STAGES}
            times = take_turns(stages, turns)
            row = {name: times.median(name) for name in STAGES}
            memory = peak_megabytes(step)
            rows.setdefault(quantity, []).append({"value": value, **row, "memory_mb": memory})
            print(NAMES[quantity], value, {k: round(v, 3) for k, v in row.items()}, flush=True)
    return rows


def peak_megabytes(step: Step) -> float:
    """Return what the tensors of an update take at most beside the weights, by torch's tracker."""
    tracker = MemTracker()
    tracker.track_external(step.model)
    with tracker:
        step.update()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    weights = sum(parameter.nbytes for parameter in step.model.parameters())
    return float(snapshot["Total"] - weights) / 1e6


def exponent(points: list[dict[str, Any]], column: str) -> float:
    """Return e of column = c * value^e, fitted to the last three points."""
    last = points[-3:]
    values = [max(point[column], 1e-9) for point in last]
    return float(np.polyfit(np.log([p["value"] for p in last]), np.log(values), 1)[0])


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table of exponents."""
    lines = [
        "| grows | from - to | rollout | score | render | update | memory of the update |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for quantity, points in rows.items():
        cells = [f"{exponent(points, column):.2f}" for column in (*STAGES, "memory_mb")]
        span = f"{points[0]['value']:,} - {points[-1]['value']:,}"
        lines.append(f"| {NAMES[quantity]} | {span} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --- the plot ------------------------------------------------------------------------------------

COLOURS = {"rollout": "#0072b2", "score": "#009e73", "render": "#d55e00", "update": "#cc79a7"}
PANEL, GAP, TOP = 220, 60, 40


def plot(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return an SVG of four panels, seconds over the quantity, both axes logarithmic."""
    everything = [point[stage] for points in rows.values() for point in points for stage in STAGES]
    low, high = np.log(min(everything)), np.log(max(everything))
    width = len(rows) * (PANEL + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{PANEL + 2 * TOP + 30}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for index, (quantity, points) in enumerate(rows.items()):
        left = GAP + index * (PANEL + GAP)
        start, end = np.log(points[0]["value"]), np.log(points[-1]["value"])

        def place(point: dict[str, Any], stage: str, left=left, start=start, end=end) -> str:
            x = left + PANEL * (np.log(point["value"]) - start) / (end - start)
            y = TOP + PANEL * (1 - (np.log(point[stage]) - low) / (high - low))
            return f"{x:.1f},{y:.1f}"

        bottom = TOP + PANEL
        parts.append(
            f'<rect x="{left}" y="{TOP}" width="{PANEL}" height="{PANEL}" fill="none" '
            f'stroke="#999"/><text x="{left}" y="{TOP - 10}">{NAMES[quantity]}</text>'
            f'<text x="{left}" y="{bottom + 16}">{points[0]["value"]}</text>'
            f'<text x="{left + PANEL}" y="{bottom + 16}" text-anchor="end">'
            f"{points[-1]['value']}</text>"
        )
        for stage in STAGES:
            line = " ".join(place(point, stage) for point in points)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{COLOURS[stage]}" '
                'stroke-width="2"/>'
            )
    parts.append(f'<text x="4" y="{TOP + 10}">{np.exp(high):.1f} s</text>')
    parts.append(f'<text x="4" y="{TOP + PANEL}">{1000 * np.exp(low):.0f} ms</text>')
    for index, (stage, colour) in enumerate(COLOURS.items()):
        x, y = GAP + 120 * index, TOP + PANEL + 44
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{stage}</text>')
    return "".join(parts) + "</svg>\n"


def main() -> None:
    """Measure, print the table and, if asked, write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.turns)
    print(table(rows))
    if options.write:
        result = {"machine": machine(), "base": BASE, "rows": rows}
        write_text(RESULTS / "growth.json", json.dumps(result, indent=2) + "\n")
        write_text(RESULTS / "growth.md", table(rows))
        write_text(PLOT, plot(rows))


if __name__ == "__main__":
    main()
