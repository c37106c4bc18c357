"""Build the shipped base policy: `python -m cli.make_base`, or `make base`.

Runs the five recipes of `recipes/base` one after the other under `build/base`, skipping stages that
are done, then measures the gates, prints them and writes the policy with its card into
`policy/base`.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from data.prompts import GENEVAL_TASKS
from data.scenes import scene_prompts
from evals.fidelity import fidelity, two_noise_correlation
from policy import Policy, base_path
from policy.policy import to_images
from policy.sampling import ImageTokenSampler, Sampling
from recipes import load_recipe
from rewards.geneval import geneval
from rewards.ocr import ocr
from rl.build import build

STAGES = (
    "1-image-tokenizer",
    "2-autoencoder",
    "3-language-model",
    "4-noisy-captions",
    "5-diffusion-head",
)
BUILD = Path("build/base")
SIGN_BOX = (0.0, 1 / 3, 1.0, 2 / 3)
GATES: dict[str, tuple[float, float]] = {
    "a. fidelity to tokens": (0.95, 1.0),
    "b. two-noise correlation": (0.9, 1.0),
    "b. fidelity under a swapped prompt": (0.9, 1.0),
    "c. position before noise": (0.5, 1.0),
    "c. color_attr before noise": (0.5, 1.0),
    "d. strict after noise": (0.35, 0.65),
    "d. sign words after noise": (0.3, 0.8),
}


class _Lines:
    """Progress as plain lines."""

    def start(self, task: str, total: int | None) -> None:
        print(f"{task}: {total} steps", flush=True)

    def advance(self, task: str, n: int = 1, **facts: float | int | str | None) -> None:
        print("  " + "  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)

    def finish(self, task: str) -> None:
        pass

    def line(self, text: str) -> None:
        print(text, flush=True)


def main() -> int:
    """Build, measure, write; 1 if a gate is missed."""
    before: Path | None = None
    for stage in STAGES:
        overrides = [] if before is None else [f"policy.path={before / 'policy'}"]
        folder = BUILD / stage
        if not (folder / "policy" / "policy.json").is_file():
            print(f"== {stage}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            build(load_recipe(f"base/{stage}", overrides), folder, _Lines())
        before = folder
    clean = Policy.from_pretrained(BUILD / "3-language-model" / "policy")
    target = base_path()
    staged = BUILD / "ship"
    shutil.rmtree(staged, ignore_errors=True)
    Policy.from_pretrained(BUILD / STAGES[-1] / "policy").save_pretrained(staged, torch.bfloat16)
    shipped = Policy.from_pretrained(staged)
    measured = measure(shipped, clean)
    met = {gate: low <= measured[gate] <= high for gate, (low, high) in GATES.items()}
    for gate, (low, high) in GATES.items():
        verdict = "ok" if met[gate] else "MISSED"
        print(f"gate {gate}: {measured[gate]:.3f} (from {low} to {high}) {verdict}")
    write_card(staged, measured, met)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(staged, target)
    print(f"wrote {target}")
    return 0 if all(met.values()) else 1


def measure(policy: Policy, clean: Policy) -> dict[str, Any]:
    """Return every gate's figure and what stands beside it in the card.

    The language model before the noisy phase has no diffusion head of its own: its tokens are
    drawn by the image tokenizer's pixel decoder.
    """
    torch.manual_seed(0)
    faithful = fidelity(policy)
    records = scene_prompts("held_out", n=48, tasks=GENEVAL_TASKS)
    group = 12
    codes = _sample(policy, records, group)
    correlation, groups = two_noise_correlation(policy, records, codes, group)
    after, after_words = _scores(policy, render=True)
    before, before_words = _scores(clean, render=False)
    return {
        "a. fidelity to tokens": faithful.own_prompt,
        "b. two-noise correlation": correlation,
        "b. fidelity under a swapped prompt": faithful.swapped_prompt,
        "c. position before noise": before["position"],
        "c. color_attr before noise": before["color_attr"],
        "d. strict after noise": float(np.mean(list(after.values()))),
        "d. sign words after noise": after_words,
        "autoencoder alone": faithful.autoencoder,
        "fidelity in full": asdict(faithful),
        "groups in the correlation": groups,
        "strict per task before noise": before,
        "strict per task after noise": after,
        "sign words before noise": before_words,
    }


def _sample(policy: Policy, records: list[dict[str, Any]], n: int) -> torch.Tensor:
    config = policy.config
    sampler = ImageTokenSampler(
        policy.ar,
        config.image_start_id,
        config.num_image_tokens,
        config.num_tokens,
        config.pad_id,
    )
    ids = policy.prompt_ids([record["prompt"] for record in records])
    tokens, _ = sampler.sample(ids, n, Sampling(), list(range(len(ids) * n)))
    return tokens - config.image_start_id


@torch.no_grad()
def _scores(policy: Policy, render: bool, n: int = 4) -> tuple[dict[str, float], float]:
    """Return strict accuracy per task and the share of sign words read, on held-out prompts."""
    records = scene_prompts("held_out")
    prompts = [record["prompt"] for record in records for _ in range(n)]
    if render:
        images = policy.generate(prompts, seed=0)
    else:
        codes = _sample(policy, records, n)
        images = to_images(policy.image_tokenizer.preview(codes) / 2 + 0.5)
    per_task: dict[str, list[float]] = {}
    words: list[float] = []
    for i, image in enumerate(images):
        record = records[i // n]
        if record["metadata"]["tag"] == "text":
            read = ocr([image], [record["prompt"]], box=SIGN_BOX, contains=False)[0]
            words.append(float(read.details["exact"]))
        else:
            judged = geneval([image], [record["metadata"]])[0]
            per_task.setdefault(record["metadata"]["tag"], []).append(judged.details["strict"])
    return {task: float(np.mean(v)) for task, v in per_task.items()}, float(np.mean(words))


def write_card(folder: Path, measured: dict[str, Any], met: dict[str, bool]) -> None:
    """Write README.md: what the policy is, how it was made, what was measured, its sha256 sums."""
    rows = "\n".join(
        f"| {gate} | {measured[gate]:.3f} | {low} to {high} | {'yes' if met[gate] else '**no**'} |"
        for gate, (low, high) in GATES.items()
    )
    files = sorted(p for p in folder.rglob("*.safetensors"))
    sums = "\n".join(
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder)}" for p in files
    )
    sizes = {p.parent.name: _parameters(p) for p in files}
    parts = "\n".join(f"| {name} | {count:,} |" for name, count in sizes.items())
    rest = json.dumps(
        {k: v for k, v in measured.items() if k not in GATES}, indent=2, default=float
    )
    (folder / "README.md").write_text(
        CARD.format(rows=rows, parts=parts, total=sum(sizes.values()), rest=rest, sums=sums),
        encoding="utf-8",
    )


def _parameters(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118


CARD = """# The base policy

A tiny policy of the published architecture (Qwen3, SigLIP + SimVQ image tokens, SANA,
deep-compression autoencoder) for 48-pixel pictures of the scene world. It is the demo, the tutorial
and the test bed. It was trained from random weights on pictures that `data/scenes.py` draws, and on
nothing else.

Made by `make base`: the five recipes of `recipes/base`, in float32 on CPU, stored in bfloat16.
The fourth stage trains on captions of which 32 % have one wrong word. This stands for the noise of
web data and is done on purpose: a policy without mistakes would leave reinforcement learning
nothing to improve.

## Gates

Measured on held-out combinations of shape, colour and relation (`data/scene_split.py`; a single
object of any colour cannot be held out), at the policy's default steps and guidance, temperature 1.

| gate | measured | range | met |
| --- | --- | --- | --- |
{rows}

"Before noise" figures are of the language model after stage 3, its tokens drawn by the image
tokenizer's own pixel decoder.

```json
{rest}
```

## Parts

| part | parameters |
| --- | --- |
{parts}
| total | {total:,} |

## sha256

```
{sums}
```
"""

if __name__ == "__main__":
    sys.exit(main())
