"""The control of the RL bars: GenEval's scores, handed to the wrong pictures.

The scores keep their distribution and lose their meaning, so a policy that gets better under them
got better by something other than the reward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from common.seeds import counter_seed
from rewards import Score, reward
from rewards.geneval import geneval


@reward(name="shuffled_geneval", whole_batch=True)
def shuffled_geneval(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    extra_penalty: float = 0.15,
) -> list[Score]:
    """Return the `geneval` scores with the values permuted among the pictures of each prompt.

    The permutation is a function of the values and the prompt, so that a resumed run repeats it.
    """
    scores = geneval(images, metadata, extra_penalty=extra_penalty)
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    shuffled = list(scores)
    for prompt, rows in groups.items():
        values = [scores[row].value for row in rows]
        order = np.random.default_rng(counter_seed(0, "shuffle", prompt, str(values)))
        for row, source in zip(rows, order.permutation(len(rows)), strict=True):
            shuffled[row] = replace(scores[row], value=values[source])
    return shuffled
