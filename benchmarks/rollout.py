"""Tokens per second of the rollout engines, beside plain `generate` and raw `vllm.LLM.generate`.

    python -m benchmarks.rollout [--threads 1] [--repeats 3]

One run, one model of the shipped base's size with random weights, 12 prompts x 12 samples of 36
tokens. The contenders take turns, so that a slow spell of the machine falls on all of them; each
gets the median of its repeats. The last columns say how much faster each engine is than plain
`generate` and than raw vLLM.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from common.heavy import prepare_torchvision
from rollout import Sampling

START, IMAGES, LENGTH = 600, 512, 36
PROMPTS, GROUP = 12, 12


def build_model():
    """Return a random `Qwen3ForCausalLM`: hidden 192, 6 layers, head_dim 32, tied head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=START + IMAGES,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def plain_generate(model, prompts: list[list[int]]) -> Callable[[], object]:
    """Return what one writes without an engine: padded batch, `generate`, scores kept."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(p)) + p for p in prompts for _ in range(GROUP)]
    masks = [[0] * (width - len(p)) + [1] * len(p) for p in prompts for _ in range(GROUP)]
    ids, mask = torch.tensor(rows), torch.tensor(masks)
    closed = list(range(START))

    def run() -> object:
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            suppress_tokens=closed,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = torch.stack(output.scores, 1).log_softmax(-1)
        return scores.gather(2, output.sequences[:, width:, None])

    return run


def raw_vllm(engine, prompts: list[list[int]]) -> Callable[[], object]:
    """Return the same work asked of the `vllm.LLM` inside `engine`, n samples a request."""
    from vllm import SamplingParams

    params = SamplingParams(
        n=GROUP,
        seed=0,
        max_tokens=LENGTH,
        ignore_eos=True,
        allowed_token_ids=list(range(START, START + IMAGES)),
        logprobs=0,
        detokenize=False,
    )

    def run() -> object:
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        with torch.compiler.set_stance("force_eager"):
            return engine._llm.generate(requests, params, use_tqdm=False)

    return run


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prepare_torchvision()
    from rollout.transformers_engine import TransformersEngine
    from rollout.vllm_engine import VllmEngine

    model = build_model()
    lengths = [20 + 2 * index for index in range(PROMPTS)]
    prompts = [torch.randint(1, START, (length,)).tolist() for length in lengths]
    seeds = list(range(PROMPTS * GROUP))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        begin = time.perf_counter()
        vllm = VllmEngine(
            folder, START, IMAGES, LENGTH, max_prompt_length=64, threads=arguments.threads
        )
        started = time.perf_counter() - begin
    transformers = TransformersEngine(model, START, IMAGES, LENGTH, pad_id=0)
    contenders: dict[str, Callable[[], object]] = {
        "transformers generate": plain_generate(model, prompts),
        "raw vllm.LLM.generate": raw_vllm(vllm, prompts),
        "transformers engine": lambda: transformers.generate(prompts, GROUP, Sampling(), seeds),
        "vllm engine": lambda: vllm.generate(prompts, GROUP, Sampling(), seeds),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(arguments.repeats + 1):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - begin)
    tokens = PROMPTS * GROUP * LENGTH
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    print(
        f"{PROMPTS * GROUP} sequences x {LENGTH} tokens, {arguments.threads} thread(s), "
        f"torch {torch.__version__}; vLLM started in {started:.1f} s"
    )
    print(f"{'':24}{'tokens/s':>10}{'x generate':>12}{'x raw vLLM':>12}")
    for name, rate in speed.items():
        over_generate = rate / speed["transformers generate"]
        over_vllm = rate / speed["raw vllm.LLM.generate"]
        print(f"{name:24}{rate:>10,.0f}{over_generate:>12.2f}{over_vllm:>12.2f}")
    vllm.close()


if __name__ == "__main__":
    main()
