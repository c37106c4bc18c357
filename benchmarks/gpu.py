"""Speed on one GPU at true dimensions, random weights, no download: one command, one table.

    python -m benchmarks.gpu [--wheels FOLDER] [--images 512] [--only sampling ...] [--write]
    python -m benchmarks.gpu --toy        the same code on any machine, at toy size: no figures

Qwen3-0.6B and 1.7B with the published vocabulary (217,210 tokens, 729 a picture), SANA1.5-1.6B and
DC-AE f32c32, in bfloat16. First the machine's own ceilings are measured: matrix products and
copies. A row says what share of its ceiling it reaches, against the targets of the project
(sampling 60 % of the memory's speed, decode 50 % and update 40 % of the matrix rate, a step 6
times as fast as the published way). It needs torch and transformers; a row whose libraries
(diffusers, peft, trl, vllm) are absent, and cannot be installed from the wheels in FOLDER, is
skipped and says so, and so is one that does not fit the memory. Results go to
benchmarks/results/gpu-NAME.json, with the GPU's name, unless --toy: nothing that was not measured
on a GPU is written.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_models import (
    Renderer,
    language_model,
    our_step,
    published_step,
    update_step,
)
from benchmarks.gpu_rows import GROUP, PROMPT, TOY, TRUE, Bench
from benchmarks.machine import machine
from policy.sampling import ImageTokenSampler, Sampling

RESULTS = Path(__file__).parent / "results"
OPTIONAL = ("diffusers", "peft", "trl", "vllm", "pydantic")


# --- sections ------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """The machine's own matrix rate and copy speed, which the shares below refer to."""
    size = bench.size
    side = size.square
    left, right = (torch.randn(side, side, device=size.device, dtype=size.dtype) for _ in range(2))
    seconds = bench.seconds(lambda: [left @ right for _ in range(10)])
    bench.matmul = 10 * 2 * side**3 / seconds
    bench.add("ceiling: matrix products", bench.matmul / 1e12, "TFLOP/s")
    source = torch.empty(16 * side * side, device=size.device, dtype=size.dtype)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: [target.copy_(source) for _ in range(10)])
    bench.bandwidth = 10 * 2 * source.numel() * source.element_size() / seconds
    bench.add("ceiling: memory copies", bench.bandwidth / 1e9, "GB/s")


def sampling(bench: Bench) -> None:
    """Image tokens a second by batch: our sampler, transformers with a static cache, vLLM."""
    for name, config in bench.size.models.items():
        model = language_model(config, bench.size)
        for batch in bench.size.batches:
            share = _sampling_share(bench, model, batch)
            label = f"{name}, batch {batch}"
            _sampled(
                bench, f"{label}: our sampler", _own_sampler(bench, model, batch), batch, share
            )
            if bench.size.device == "cuda":  # elsewhere compiling takes minutes and tells nothing
                run = _static_cache(bench, model, batch)
                _sampled(bench, f"{label}: transformers, static cache", run, batch, share)
        del model
        for cache in ("auto", "fp8"):
            row = f"{name}: vLLM, cache {cache}"
            bench.section(row, partial(_vllm, name=row, config=config, cache=cache))


def _own_sampler(bench: Bench, model: Any, batch: int) -> Callable[[], object]:
    size, group = bench.size, min(GROUP, batch)
    sampler = ImageTokenSampler(
        model, size.image_start, size.image_tokens, size.tokens, 0, max(size.batches)
    )
    prompts = [[1] * PROMPT] * (batch // group)
    return lambda: sampler.sample(prompts, group, Sampling(), list(range(batch)))


def _static_cache(bench: Bench, model: Any, batch: int) -> Callable[[], object]:
    ids = torch.ones(batch, PROMPT, dtype=torch.int64, device=bench.size.device)
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=bench.size.tokens,
        min_new_tokens=bench.size.tokens,
        cache_implementation="static",
        pad_token_id=0,
    )


def _sampled(
    bench: Bench,
    label: str,
    run: Callable[[], object],
    batch: int,
    share: Callable[[float], float],
) -> None:
    seconds = bench.seconds(run, repeats=1)
    bench.add(label, batch * bench.size.tokens / seconds, "tokens/s", share(seconds))


def _sampling_share(bench: Bench, model: nn.Module, batch: int) -> Callable[[float], float]:
    """Time of reading weights and cache once a token, as a share of the seconds taken."""
    size, config = bench.size, model.config
    element = torch.empty((), dtype=size.dtype).element_size()
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    head = size.image_tokens * config.hidden_size
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    length = PROMPT + size.tokens / 2
    a_token = element * (layers + head + batch * length * kept)
    return lambda seconds: size.tokens * a_token / bench.bandwidth / seconds


def _vllm(bench: Bench, *, name: str, config: dict[str, Any], cache: str) -> None:
    size = bench.size
    if size.device != "cuda":
        bench.skip(name, "only measured on a GPU")
        return
    import vllm

    model = language_model(config, size)
    share = {batch: _sampling_share(bench, model, batch) for batch in size.batches}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        engine = vllm.LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            kv_cache_dtype=cache,
            max_model_len=PROMPT + size.tokens,
            max_num_seqs=max(size.batches),
            gpu_memory_utilization=0.8,
        )
    parameters = vllm.SamplingParams(
        n=GROUP,
        max_tokens=size.tokens,
        ignore_eos=True,
        detokenize=False,
        allowed_token_ids=list(range(size.image_start, size.image_start + size.image_tokens)),
    )
    for batch in size.batches:
        requests = [{"prompt_token_ids": [1 + i] * PROMPT} for i in range(batch // GROUP)]
        _sampled(
            bench,
            f"{name}, batch {batch}",
            partial(engine.generate, requests, parameters, use_tqdm=False),
            batch,
            share[batch],
        )


def decode(bench: Bench) -> None:
    """Pictures a second of the head (ours, compiled, published loop) and of the autoencoder."""
    size, policy = bench.size, Renderer(bench.size)
    count = min(size.images, 32)
    for latent, steps, guidance in size.decodes:
        given = (*policy.inputs(count, latent), steps, guidance)
        operations = policy.flops(latent, steps, guidance)
        label = f"decode, latents {latent}x{latent}, {steps} steps, guidance {guidance:g}"
        ways = {"ours": policy.ours, "published loop": policy.loop}
        for name, way in ways.items():
            rate = count / bench.seconds(partial(way, *given))
            bench.add(f"{label}: {name}", rate, "pictures/s", rate * operations / bench.matmul)
        if size.device != "cuda":
            continue
        rate = count / bench.seconds(partial(policy.ours, *given, compiled=True))
        bench.add(f"{label}: ours, compiled", rate, "pictures/s", rate * operations / bench.matmul)
    latents = policy.inputs(count, size.latent)[1][:8]
    rate = len(latents) / bench.seconds(lambda: policy.pixels(latents))
    bench.add("decode, autoencoder alone", rate, "pictures/s")


def update(bench: Bench) -> None:
    """Forward and backward pass of one micro-batch, as a share of the matrix rate."""
    from policy.anatomy import Part
    from recipes.schema_common import LoraSection
    from rl.flops import update_flops

    size = bench.size
    for name, config in size.models.items():
        for adapters in (True, False):
            model = language_model(config, size)
            shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
            lora = LoraSection(rank=16, alpha=32) if adapters else None
            step = update_step(model, size, lora)
            operations = size.micro_batch * update_flops(
                Part(shapes, config), PROMPT + size.tokens, size.tokens, size.image_tokens, lora
            )
            rate = 1 / bench.seconds(step)
            kind = "LoRA" if adapters else "full"
            label = f"update, {name}, {kind}, {size.micro_batch} pictures"
            bench.add(
                label, rate * size.micro_batch, "pictures/s", rate * operations / bench.matmul
            )
            del model, step


def sync(bench: Bench) -> None:
    """Weights pushed into a second model on the same device, and both fingerprints."""
    from rollout.sync import ModelSide, push_weights
    from rollout.transformers_engine import TransformersEngine

    size = bench.size
    for name, config in size.models.items():
        model, other = language_model(config, size), language_model(config, size)
        images = (size.image_start, size.image_tokens)
        engine = TransformersEngine(other, *images, size.tokens, 0)
        side = ModelSide(model, 1, [], *images)
        bench.add(f"sync, {name}, proved", bench.seconds(partial(push_weights, engine, side)), "s")


def step(bench: Bench) -> None:
    """Sampling, scoring, decode and update of all pictures, the published way and ours.

    Both update all weights, a micro-batch at a time. Ours decodes as training does by default (a
    quarter of the latents, 10 steps, no guidance), and once more with the published settings.
    """
    size = bench.size
    name, config = next(iter(size.models.items()))
    model, renderer = language_model(config, size), Renderer(size)
    cheap = size.decodes[-1]
    full = size.decodes[0]
    taken = {
        "published": bench.once(lambda: published_step(model, renderer, size, full)),
        "ours": bench.once(lambda: our_step(model, renderer, size, cheap)),
        "ours, same decode": bench.once(lambda: our_step(model, renderer, size, full)),
    }
    for way, seconds in taken.items():
        bench.add(f"step, {name}, {size.images} pictures: {way}", seconds, "s")
    for way in ("ours", "ours, same decode"):
        bench.add(f"step ratio: {way}", taken["published"] / taken[way], "x")


SECTIONS = {
    "ceilings": ceilings,
    "sampling": sampling,
    "decode": decode,
    "update": update,
    "sync": sync,
    "step": step,
}


# --- the command ---------------------------------------------------------------------------------


def install(folder: Path) -> None:
    """Install what is missing from wheels, into a folder of this process alone."""
    target = tempfile.mkdtemp(prefix="atelier-wheels-")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links"]
    for name in OPTIONAL:
        # Without dependencies: the machine's own torch has to stay.
        command = [*pip, str(folder), "--target", target, "--no-deps", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: no wheel in {folder} that fits")
    sys.path.append(target)


def main(arguments: list[str]) -> int:
    """Measure the sections and write the results of a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is missing")
    parser.add_argument("--images", type=int, help="pictures of the whole step")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, no results")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        print("There is no GPU here. Nothing was measured; --toy runs the same code on the CPU.")
        return 1
    if options.wheels:
        install(options.wheels)
    size = TOY if options.toy else TRUE
    if options.images:
        size.images = options.images
    bench = Bench(size)
    for name in dict.fromkeys(["ceilings", *options.only]):
        bench.section(name, SECTIONS[name])
    if options.toy:
        print("TOY: these rows show that the code runs, and nothing else")
    elif options.write:
        gpu = torch.cuda.get_device_name()
        facts = machine() | {"gpu": gpu, "cuda": torch.version.cuda}
        path = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}.json"
        path.write_text(json.dumps({"machine": facts, "rows": bench.rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
