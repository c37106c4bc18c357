"""One process of a distributed run: `torchrun ... zero_worker.py RECIPE OUT RUNS...`.

Each of RUNS is `name` or `name:key=value;key=value`. They follow one another in one launch, because
starting takes longer than training.
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

import rl.zero
from recipes import load_recipe
from rl.build import build

# The test policy is so small that nothing of it would be divided.
rl.zero.WHOLE_BELOW = 0


def main(recipe: str, out: str, *runs: str) -> None:
    """Train one run after the other, each as if it were alone."""
    for run in runs:
        name, _, overrides = run.partition(":")
        build(load_recipe(recipe, [o for o in overrides.split(";") if o]), Path(out) / name)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
