"""Log-probs and their gradient: the image rows against TRL's fused head and a full softmax.

    python -m benchmarks.logprobs [--turns 3] [--hidden 256]

The head stage alone, at the published vocabulary (217,210 tokens, of them 65,536 image tokens) and
one picture of 729 tokens: log-probs, entropies, and the gradient of the hidden states, with the
head frozen as under LoRA. The width is that of a smaller model (256 instead of 1,024 or 2,048), so
that all three fit a small machine: arithmetic grows with it, the logits do not. Peak memory is
what the process grows by.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from benchmarks.timing import Ratio, main, peak_memory, take_turns
from rl.image_head import image_logprobs

VOCABULARY, IMAGE_START, IMAGES, TOKENS, HIDDEN = 217_210, 151_674, 65_536, 729, 256
TRL_TILE = 32_768


def ratios(turns: int) -> list[Ratio]:
    """Return time and memory of both comparisons."""
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5
    codes = torch.randint(IMAGES, (1, TOKENS))
    states = torch.randn(1, TOKENS, HIDDEN)

    def graded(logprobs_of: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hidden = states.clone().requires_grad_()
            logprobs_of(hidden).sum().backward()
            return hidden.grad

        return run

    def full_softmax(hidden: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, weight)
        with torch.no_grad():
            entropy_from_logits(logits)
        return selective_log_softmax(logits, codes + IMAGE_START)

    def trl_fused(hidden: Tensor) -> Tensor:
        targets = (codes + IMAGE_START).flatten()
        wanted = ("log_probs", "entropy")
        return ChunkedLogProbFunction.apply(
            hidden[0], weight, None, targets, 1.0, TRL_TILE, None, 1.0, wanted
        )[0]

    def ours(hidden: Tensor) -> Tensor:
        return image_logprobs(hidden, weight[IMAGE_START : IMAGE_START + IMAGES], codes)[0]

    contenders = {
        "full": graded(full_softmax),
        "trl": graded(trl_fused),
        "ours": graded(ours),
    }
    memory = {name: peak_memory(run) for name, run in contenders.items()}
    times = take_turns(contenders, turns)
    rows = []
    for name, other in (("TRL's fused head", "trl"), ("full-vocabulary softmax", "full")):
        rows.append(times.ratio(f"log-probs, time: {name}", other, "ours"))
        rows.append(
            Ratio(
                f"log-probs, peak memory: {name}",
                memory[other] / memory["ours"],
                detail=f"{memory['ours']:.0f} MB against {memory[other]:.0f} MB",
            )
        )
    return rows


if __name__ == "__main__":
    main(ratios, __doc__, turns=3)
