"""vLLM in this process, as a sampler of image tokens.

vLLM changes the process that it starts in: environment variables that child processes inherit (an
LD_PRELOAD among them), the global random states, `torch.set_num_threads`. The constructor puts all
of that back, so that the trainer beside it computes what it would compute alone.
"""

from __future__ import annotations

import json
import logging
import os
import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import PolicyError, RunError
from common.heavy import prepare_torchvision
from policy.sampling import Sampling
from rollout.engine import RolloutBatch, WeightMismatch, check_request, fingerprint_tensors
from rollout.vllm_adapter import adapter_settings, read_adapter, swap_adapter
from rollout.vllm_weights import read_weights, repack_tied_head
from rollout.weights import as_mapping, check_names

# vLLM's own variables, read while it is imported and started.
_ENVIRONMENT = {
    # The engine core runs in this process: weights are pushed as tensors, not through a socket.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

_CACHE_TOO_SMALL = ("memory for the cache blocks", "available KV cache memory")
"""What vLLM says of a cache without room for a block, and for the longest sequence."""


class VllmEngine:
    """Samples with vLLM from an AR folder (`POLICY/ar`), on the CPU or one GPU.

    Args:
        ar_folder: a `Qwen3ForCausalLM` checkpoint. On the CPU its head_dim must be one of vLLM's
            (32, 64, 80, 96, 112, 128, ...).
        image_start_id, num_image_tokens: vocabulary ids of the image tokens.
        completion_length: N, tokens of a picture.
        dtype: type of weights, and of the cache if that is "auto".
        max_prompt_length: longest prompt in tokens.
        max_sequences: most sequences sampled at the same time.
        cache_gib: memory for keys and values, in GiB.
        cache_dtype: "fp8" keeps them in 8 bits (e4m3, scale 1): samples then come from a law a
            little beside the trainer's, and their log-probs are of that law.
        sleep: leave the GPU after each `generate`: weights wait in host memory, the cache is
            dropped, and whatever needs them next brings them back.
        compile_model: compile (CPU: about 30 s) or capture graphs (GPU) at the start.
        threads: threads of torch's pool while sampling; None leaves the process's setting.
        lora_rank: rank of the adapter that pushes consist of, beside the base in `ar_folder`; None:
            pushes are whole models.
    """

    def __init__(
        self,
        ar_folder: str | Path,
        image_start_id: int,
        num_image_tokens: int,
        completion_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        max_prompt_length: int = 256,
        max_sequences: int = 256,
        cache_gib: float = 1.0,
        cache_dtype: Literal["auto", "fp8"] = "auto",
        sleep: bool = False,
        compile_model: bool = False,
        threads: int | None = None,
        lora_rank: int | None = None,
    ) -> None:
        if not (Path(ar_folder) / "config.json").is_file():
            raise PolicyError(f"{ar_folder} has no config.json; give the ar folder of a policy")
        self.step: int | None = None
        self._dtype = dtype
        self._completion_length = completion_length
        self._max_prompt_length = max_prompt_length
        self._image_ids = list(range(image_start_id, image_start_id + num_image_tokens))
        self._threads = threads
        self._lora_rank = lora_rank
        self._adapter: Any = None  # what requests name it by
        self._compiled = compile_model
        self._sleeps = sleep
        self._held: str | None = None  # the fingerprint of the last push
        self._owns_process_group = not torch.distributed.is_initialized()
        with _process_untouched():
            self._llm = _start(
                Path(ar_folder),
                model=str(ar_folder),
                skip_tokenizer_init=True,
                dtype=str(dtype).removeprefix("torch."),
                enforce_eager=not compile_model,
                distributed_executor_backend="uni",
                kv_cache_memory_bytes=int(cache_gib * 2**30),
                kv_cache_dtype=cache_dtype,
                enable_sleep_mode=sleep,
                # That much of a GPU must be free at the start, which the trainer has begun to
                # fill; vLLM takes what its weights and the cache need.
                gpu_memory_utilization=0.01,
                # Prompts are short; a prompt's first blocks are shared by its group.
                block_size=32,
                enable_prefix_caching=True,
                max_model_len=max_prompt_length + completion_length,
                max_num_seqs=max_sequences,
                max_num_batched_tokens=max(2048, max_sequences * 32),
                # Of the masked, tempered and truncated distribution: what was really sampled.
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **adapter_settings(lora_rank),
            )
        self._expected = {name: tensor.shape for name, tensor in self._weights()}

    @property
    def dtype(self) -> torch.dtype:
        """See `Engine`."""
        return self._dtype

    def generate(
        self, prompt_ids: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> RolloutBatch:
        """See `Engine`."""
        batch = self._draw(prompt_ids, n, sampling, seeds, self._completion_length)
        self._sleep()
        return batch

    def probe(self, prompt_ids: list[list[int]], length: int) -> list[RolloutBatch]:
        """See `Engine`. It stays awake for the rollouts that come next."""
        return [self._draw(prompt_ids, 1, Sampling(), list(range(len(prompt_ids))), length)]

    def _draw(
        self,
        prompt_ids: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[int],
        length: int,
    ) -> RolloutBatch:
        from vllm import SamplingParams

        check_request(prompt_ids, n, seeds)
        longest = max(map(len, prompt_ids))
        if longest > self._max_prompt_length:
            raise RunError(
                f"a prompt has {longest} tokens and the engine was started for at most "
                f"{self._max_prompt_length}; raise max_prompt_length"
            )
        if self._wake():
            self.fingerprint()  # since the push nobody has seen what came back
        # One request a sample: with n > 1 vLLM derives the samples' seeds from one, as seed + i.
        owners = [ids for ids in prompt_ids for _ in range(n)]
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=seed,
                min_tokens=length,
                max_tokens=length,
                ignore_eos=True,
                allowed_token_ids=self._image_ids,
                logprobs=0,  # no alternatives: the sampled token's own
                detokenize=False,
            )
            for seed in seeds
        ]
        with _random_states_kept(), self._own_threads(), self._eager():
            outputs = self._llm.generate(
                [{"prompt_token_ids": ids} for ids in owners],
                params,
                use_tqdm=False,
                lora_request=self._adapter,
            )
        tokens, logprobs = [], []
        for output in outputs:
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            if len(ids) != length:
                raise RunError(f"vLLM returned {len(ids)} tokens instead of {length}")
            tokens.append(ids)
            logprobs.append([at[i].logprob for at, i in zip(completion.logprobs, ids, strict=True)])
        return RolloutBatch(
            prompt_ids=owners,
            completion_ids=torch.tensor(tokens, dtype=torch.int64),
            behaviour_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """See `Engine`. Incomplete pushes are refused before they touch anything.

        vLLM itself would take one with a warning, and fill the rest of a fused layer with whatever
        was in memory.
        """
        tensors = as_mapping(named_tensors)
        self._wake()
        self._held = None
        if self._lora_rank is not None:
            self._adapter = swap_adapter(self._llm, tensors, self._lora_rank)
        else:
            self._reload(check_names(tensors, self._expected, "vllm"))
        # Keys and values of prompts, computed with the old weights.
        if not self._llm.reset_prefix_cache():
            raise RunError("vLLM could not drop its prefix cache while requests were running")
        self.step = step

    def fingerprint(self) -> str:
        """See `Engine`. Packed weights are read back out of the kernels that use them.

        Raises `WeightMismatch` if they have changed since the last push.
        """
        self._wake()
        found = fingerprint_tensors(self._weights())
        if self._held not in (None, found):
            raise WeightMismatch(
                "inside vLLM the weights have changed since the last push (fingerprints "
                f"{found[:12]} and {str(self._held)[:12]}); stop: its samples would not come from "
                "this policy"
            )
        self._held = found
        return found

    def close(self) -> None:
        """See `Engine`."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        if self._owns_process_group:
            cleanup_dist_env_and_memory()

    def _sleep(self) -> None:
        if not self._sleeps:
            return
        if self._held is None:
            self.fingerprint()
        self._llm.sleep(level=1)

    def _wake(self) -> bool:
        """Bring weights and cache back onto the GPU; return whether they were away."""
        if not self._llm.llm_engine.is_sleeping():
            return False
        # vLLM asks the driver for memory, not torch, which keeps what the trainer has freed.
        torch.cuda.empty_cache()
        self._llm.wake_up()
        return True

    def _reload(self, tensors: dict[str, Tensor]) -> None:
        pushed = [(name, tensor.detach()) for name, tensor in tensors.items()]
        with _random_states_kept(), torch.no_grad():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(pushed)})
            self._llm.apply_model(repack_tied_head)

    def _weights(self) -> list[tuple[str, Tensor]]:
        [weights] = self._llm.apply_model(read_weights)
        [adapter] = self._llm.apply_model(partial(read_adapter, rank=self._lora_rank))
        return [*weights, *adapter]

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        if self._threads is None:
            yield
            return
        before = torch.get_num_threads()
        # vLLM's CPU kernels use the OpenMP runtime of torch, so this governs both.
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def _eager(self) -> Iterator[None]:
        # vLLM compiles a helper that ranks log-probs, eager mode or not: 17 s at the first request.
        if self._compiled:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


def _start(ar_folder: Path, **settings: Any) -> Any:
    """Import vLLM, check that it can serve the checkpoint and return its `LLM`."""
    os.environ.update(_ENVIRONMENT)
    prepare_torchvision()
    # vLLM configures its logger only after its import has logged. What it warns of at the start is
    # about servers: chat templates, preloaded allocators, the missing tokenizer.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
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
def _process_untouched() -> Iterator[None]:
    """Put environment, random states and thread settings back as they were."""
    environment = dict(os.environ)
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with _random_states_kept():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        # On the CPU vLLM replaces the function by one that does nothing but warn.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """vLLM seeds and draws from the global generators, which belong to the trainer."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
