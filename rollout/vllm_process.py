"""How vLLM is started in a process that does other things as well.

vLLM changes the process that it starts in: environment variables that child processes inherit (an
LD_PRELOAD among them), the global random states, `torch.set_num_threads`. `process_untouched` puts
all of that back, so that the trainer beside it computes what it would compute alone.
"""

from __future__ import annotations

import json
import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import PolicyError, RunError
from common.heavy import prepare_torchvision

# vLLM's own variables, read while it is imported and started.
_ENVIRONMENT = {
    # The engine core runs in this process: weights are pushed as tensors, not through a socket.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

_CACHE_TOO_SMALL = ("memory for the cache blocks", "available KV cache memory")
"""What vLLM says of a cache without room for a block, and for the longest sequence."""


def start_llm(ar_folder: Path, **settings: Any) -> Any:
    """Import vLLM, check that it can serve the checkpoint and return its `LLM`."""
    with import_vllm():
        import vllm
        from vllm.config.logging import LoggingConfig
        from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
        from vllm.platforms import current_platform

        if settings["enable_sleep_mode"] and not current_platform.is_sleep_mode_available():
            raise RunError(
                "rollout.vllm.sleep: vLLM sleeps on a GPU, and this one runs on the CPU.\n"
                "    Fix: rollout.vllm.sleep=false"
            )
        if current_platform.is_cpu():
            _check_cpu_attention(ar_folder, settings["kv_cache_dtype"])
        # Given as a class, the model is not inspected in a further process: that process would
        # import torchvision without our preparation, and takes seconds.
        vllm.ModelRegistry.register_model("Qwen3ForCausalLM", Qwen3ForCausalLM)
        try:
            return vllm.LLM(logging_config=LoggingConfig(log_level="ERROR"), **settings)
        except ValueError as error:
            if not any(words in str(error) for words in _CACHE_TOO_SMALL):
                raise
            told = str(error).split(" Try ")[0]  # it advises settings of its own
            fix = "raise rollout.vllm.cache_gib."
            raise RunError(f"vLLM cannot start: {told}\n    Fix: {fix}") from None


@contextmanager
def import_vllm() -> Iterator[None]:
    """Where vLLM is imported and started; inside of `process_untouched`."""
    os.environ.update(_ENVIRONMENT)
    prepare_torchvision()
    # vLLM configures its logger only after its import has logged. What it warns of at the start is
    # about servers: chat templates, preloaded allocators, the missing tokenizer.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def _check_cpu_attention(ar_folder: Path, cache_dtype: str) -> None:
    """vLLM would accept the model, start, and stop at the first request."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

    path = ar_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in sizes:
        raise PolicyError(
            f"{path}: head_dim is {head_dim}, and vLLM's CPU attention knows {sizes}; "
            "use the transformers engine for this policy"
        )
    try:
        _get_attn_isa(torch.float32, 32, head_dim, cache_dtype)
    except NotImplementedError as error:
        raise PolicyError(
            f"rollout.vllm.cache_dtype: {cache_dtype} does not go with {path} on this CPU: {error}"
            "\n    Fix: rollout.vllm.cache_dtype=auto"
        ) from None


@contextmanager
def process_untouched() -> Iterator[None]:
    """Put environment, random states and thread settings back as they were."""
    environment = dict(os.environ)
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with random_states_kept():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        # On the CPU vLLM replaces the function by one that does nothing but warn.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """vLLM seeds and draws from the global generators, which belong to the trainer."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
