"""Weight sync: push and prove, against writing a checkpoint and loading it anew.

    python -m benchmarks.sync [--turns 5]

The shipped tiny policy's language model, pushed into the transformers engine and compared by
fingerprint, as after every step; the other way is `save_pretrained` and `from_pretrained`, which
proves nothing.
"""

import copy
import tempfile

from transformers import Qwen3ForCausalLM

from benchmarks.timing import Ratio, main, take_turns
from policy import Policy, base_path
from rollout.sync import ModelSide, push_weights
from rollout.transformers_engine import TransformersEngine


def ratios(turns: int) -> list[Ratio]:
    """Return the ratio of the two."""
    policy = Policy.from_pretrained(base_path())
    config = policy.config
    images = (config.image_start_id, config.num_image_tokens)
    engine = TransformersEngine(copy.deepcopy(policy.ar), *images, config.num_tokens, config.pad_id)
    side = ModelSide(policy.ar, 1, [], *images)

    def checkpoint() -> None:
        with tempfile.TemporaryDirectory() as folder:
            policy.ar.save_pretrained(folder)
            Qwen3ForCausalLM.from_pretrained(folder)

    times = take_turns(
        {"checkpoint": checkpoint, "ours": lambda: push_weights(engine, side)}, turns
    )
    return [times.ratio("weight sync: checkpoint written and read", "checkpoint", "ours")]


if __name__ == "__main__":
    main(ratios, __doc__)
