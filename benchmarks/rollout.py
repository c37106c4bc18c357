"""Tokens per second of the rollout engines, beside plain `generate` and raw `vllm.LLM.generate`.

    python -m benchmarks.rollout [--turns 3]

One model of the shipped base's size with random weights, 12 prompts x 12 samples of 36 tokens.
"""

import importlib.util
import tempfile
from collections.abc import Callable

import torch

from benchmarks.timing import Ratio, main, take_turns
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


def ratios(turns: int) -> list[Ratio]:
    """Return what both engines gain; without vLLM, what the transformers engine does."""
    from rollout.transformers_engine import TransformersEngine

    model = build_model()
    lengths = [20 + 2 * index for index in range(PROMPTS)]
    prompts = [torch.randint(1, START, (length,)).tolist() for length in lengths]
    seeds = list(range(PROMPTS * GROUP))
    transformers = TransformersEngine(model, START, IMAGES, LENGTH, pad_id=0)
    contenders: dict[str, Callable[[], object]] = {
        "generate": plain_generate(model, prompts),
        "transformers": lambda: transformers.generate(prompts, GROUP, Sampling(), seeds),
    }
    vllm = None
    if importlib.util.find_spec("vllm") is not None:
        from rollout.vllm_engine import VllmEngine

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            vllm = VllmEngine(folder, START, IMAGES, LENGTH, max_prompt_length=64, threads=1)
        engine = vllm
        contenders["raw vllm"] = raw_vllm(engine, prompts)
        contenders["vllm"] = lambda: engine.generate(prompts, GROUP, Sampling(), seeds)
    times = take_turns(contenders, turns)
    tokens = PROMPTS * GROUP * LENGTH
    rows = [
        ("rollout, transformers engine: generate", "generate", "transformers"),
        ("rollout, transformers engine: raw vLLM", "raw vllm", "transformers"),
        ("rollout, vLLM engine: raw vLLM", "raw vllm", "vllm"),
    ]
    found = []
    for name, other, ours in rows:
        if other in contenders:
            row = times.ratio(name, other, ours)
            detail = f"{tokens / times.median(ours):,.0f} tokens/s, {row.detail}"
            found.append(Ratio(name, row.value, row.scatter, detail))
    if vllm is not None:
        vllm.close()
    return found


if __name__ == "__main__":
    main(ratios, __doc__, turns=3)
