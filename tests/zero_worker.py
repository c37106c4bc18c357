"""One process of a distributed run: `torchrun ... zero_worker.py RECIPE OUT RUNS...`.

Each of RUNS is `name:key=value;key=value`, or `resumed-NAME` to train the last steps of NAME again;
`name@OTHER_RECIPE:...` runs another recipe. They follow one another in one launch, because starting
takes longer than training.
"""

import shutil
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

import rl.run
import rl.zero
from common.processes import is_main_process
from policy import Policy
from recipes import load_recipe
from rl.build import build, resume

# The test policy is so small that nothing of it would be divided.
rl.zero.WHOLE_BELOW = 0


def main(recipe: str, out: str, *runs: str) -> None:
    """Train one run after the other, each as if it were alone."""
    for run in runs:
        name, _, overrides = run.partition(":")
        name, _, other = name.partition("@")
        folder = Path(out) / name
        if name.startswith("resumed-"):
            if is_main_process():
                shutil.copytree(Path(out) / name.removeprefix("resumed-"), folder)
                shutil.rmtree(folder / "policy")
                shutil.rmtree(max((folder / "checkpoints").iterdir()))
            torch.distributed.barrier()
            (rl.run.resume if "grpo" in name else resume)(folder)
        else:
            if name == "grpo-uneven" and not is_main_process():
                lack_memory_once()
            loaded = load_recipe(other or recipe, [o for o in overrides.split(";") if o])
            (rl.run.train if loaded.recipe.kind == "grpo" else build)(loaded, folder)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def lack_memory_once() -> None:
    """Let the next picture that this process renders find no memory."""
    render = Policy.render

    def lacking(*args: object, **kwargs: object) -> torch.Tensor:
        Policy.render = render
        raise torch.OutOfMemoryError("there is none")

    Policy.render = lacking


if __name__ == "__main__":
    main(*sys.argv[1:])
