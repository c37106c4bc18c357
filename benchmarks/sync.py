"""Weight sync: push and prove, against writing a checkpoint and loading it anew.

    python -m benchmarks.sync [--turns 5]

The shipped tiny policy's language model, pushed into an engine and compared by fingerprint; the
other way is `save_pretrained` and `from_pretrained`, which proves nothing. Then what a run does
after every step, which is the same and the probe prompts besides, against the push with its
fingerprint alone: below 1, the share of the sync that the probes leave to the rest.
"""

import copy
import importlib.util
import tempfile
from collections.abc import Callable

from transformers import Qwen3ForCausalLM

from benchmarks.timing import Ratio, main, take_turns
from policy import Policy, base_path
from rl.run import PROBES
from rollout.engine import Engine
from rollout.sync import ModelSide, push_weights, verify_sync
from rollout.transformers_engine import TransformersEngine


def ratios(turns: int) -> list[Ratio]:
    """Return the ratios of both engines; without vLLM, of the transformers engine."""
    policy = Policy.from_pretrained(base_path())
    config = policy.config
    images = (config.image_start_id, config.num_image_tokens)
    facts = (*images, config.num_tokens)
    probes = policy.prompt_ids(PROBES)
    side = ModelSide(policy.ar, 1, probes, *images)

    def checkpoint() -> None:
        with tempfile.TemporaryDirectory() as folder:
            policy.ar.save_pretrained(folder)
            Qwen3ForCausalLM.from_pretrained(folder)

    engines: dict[str, Engine] = {
        "transformers": TransformersEngine(copy.deepcopy(policy.ar), *facts, config.pad_id)
    }
    contenders: dict[str, Callable[[], object]] = {"checkpoint": checkpoint}
    if importlib.util.find_spec("vllm") is not None:
        from rollout.vllm_engine import VllmEngine

        longest = max(map(len, probes))
        engines["vLLM"] = VllmEngine(
            base_path() / "ar", *facts, max_prompt_length=longest, threads=1
        )
    for name, engine in engines.items():
        contenders[name] = lambda engine=engine: push_weights(engine, side)
        contenders[f"{name}, probed"] = lambda engine=engine: verify_sync(engine, side)
    times = take_turns(contenders, turns)
    if vllm := engines.get("vLLM"):
        vllm.close()
    return [
        times.ratio("weight sync: checkpoint written and read", "checkpoint", "transformers"),
        *(
            times.ratio(f"weight sync, {name}: without the probes", name, f"{name}, probed")
            for name in engines
        ),
    ]


if __name__ == "__main__":
    main(ratios, __doc__)
