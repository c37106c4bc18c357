"""vLLM in this process, as a sampler of image tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import PolicyError, RunError
from policy.sampling import Sampling
from rollout.engine import RolloutBatch, WeightMismatch, check_request, fingerprint_tensors
from rollout.vllm_adapter import adapter_settings, read_adapter, swap_adapter
from rollout.vllm_process import process_untouched, random_states_kept, start_llm
from rollout.vllm_weights import read_weights, repack_tied_head
from rollout.weights import as_mapping, check_names


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
        weight_transfer: vLLM's own way for pushes to arrive by (`transfer`); None: `load_weights`.
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
        weight_transfer: Literal["nccl", "ipc"] | None = None,
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
        with process_untouched():
            self._llm = start_llm(
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
                weight_transfer_config=weight_transfer and {"backend": weight_transfer},
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

    def probe(self, prompt_ids: list[list[int]], length: int) -> dict[str, RolloutBatch]:
        """See `Engine`. It stays awake for the rollouts that come next."""
        seeds = list(range(len(prompt_ids)))
        return {"the engine": self._draw(prompt_ids, 1, Sampling(), seeds, length)}

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
        with random_states_kept(), self._own_threads(), self._eager():
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
        self._arrived(step)

    def transfer(self, call: Literal["meet", "start", "receive", "finish"], argument: Any) -> None:
        """Take part in vLLM's own weight transfer as its other end asks (`WeightTransfer`).

        A push is one "start" with the shapes by name, "receive" with what vLLM says of the tensors,
        and "finish" with the step. Raises as `load_weights` does, before anything is received.
        """
        if call == "meet":
            self._llm.collective_rpc("shutdown_weight_transfer_engine")
            self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": argument})
            return
        with random_states_kept(), torch.no_grad():
            if call == "start":
                announced = {n: torch.empty(shape, device="meta") for n, shape in argument.items()}
                check_names(announced, self._expected, "vllm")
                self._wake()
                self._held = None
                self._llm.collective_rpc("start_weight_update")
            elif call == "receive":
                self._llm.collective_rpc("update_weights", kwargs={"update_info": argument})
            else:
                self._llm.collective_rpc("finish_weight_update")
                self._llm.apply_model(repack_tied_head)
                self._arrived(argument)

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

    def _arrived(self, step: int) -> None:
        # Keys and values of prompts, computed with the old weights.
        if not self._llm.reset_prefix_cache():
            raise RunError("vLLM could not drop its prefix cache while requests were running")
        self.step = step

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
        with random_states_kept(), torch.no_grad():
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
