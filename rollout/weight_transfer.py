"""The trainer's end of vLLM's own weight transfer: from its GPU to those of the workers.

vLLM brings two ways: NCCL broadcasts to other GPUs, and CUDA IPC, where workers read the trainer's
memory on the GPU that they share. Who takes part is fixed when they meet, so that they meet anew
whenever a worker was replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import AtelierError, RunError
from rollout.vllm_process import import_vllm, process_untouched
from rollout.weights import Push


class WeightTransfer:
    """Sends weights to vLLM engines in Ray actors (`rollout.ray_pool.SamplingActor`).

    `dtype` is the type in which they travel, that of the engines; `timeout_s`: after which a worker
    that does not answer counts as lost.
    """

    def __init__(
        self, backend: Literal["nccl", "ipc"], dtype: torch.dtype, timeout_s: float
    ) -> None:
        with process_untouched(), import_vllm():
            import vllm.distributed.weight_transfer  # noqa: F401
        self._backend = backend
        self._weights = _Weights(dtype)
        self._workers = _Workers(self._weights, timeout_s)
        self._engine: Any = None

    def send(self, workers: list[Any], tensors: dict[str, Tensor], push: Push) -> None:
        """Bring `tensors` to all of `workers`, which then hold `push`.

        Raises RunError if a worker is lost meanwhile. NCCL does not return then, here or at the
        other workers, so that the sending is done, and left behind, in a thread of its own.
        """
        self._weights.tensors, self._workers.push = tensors, push
        ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self._workers.failed = ended.put
        device = next(iter(tensors.values())).device

        def work() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(device)  # each thread has its own
                    torch.cuda.synchronize()  # vLLM packs on streams that wait for no other
                    torch.cuda.empty_cache()  # workers may share this GPU
                if self._engine is None or workers != self._workers.handles:
                    self._meet(workers)
                self._engine.send_weights()
                ended.put(None)
            except BaseException as error:
                ended.put(error)

        threading.Thread(target=work, name="weight transfer", daemon=True).start()
        error = ended.get()
        self._weights.tensors = {}
        if error is not None:
            self.close()
            if not isinstance(error, AtelierError):
                told = f"weights could not be sent to the rollout workers: {error}"
                raise _refusal(told) from error
            raise error

    def close(self) -> None:
        """Leave the others."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _meet(self, workers: list[Any]) -> None:
        import ray
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_open_port

        self.close()
        self._workers.handles = list(workers)
        if self._backend == "ipc":
            info: Any = IPCTrainerInitInfo(rank=0)
        else:
            address, port = ray.util.get_node_ip_address(), get_open_port()
            world = 1 + len(workers)
            info = NCCLTrainerInitInfo(
                rank=0, master_address=address, master_port=port, world_size=world
            )
        self._engine = WeightTransferTrainerFactory.trainer_init(
            info, client=self._workers, source=self._weights
        )


class _Weights:
    """vLLM's `WeightSource`: what is sent, in the type in which it travels."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tensors: Mapping[str, Tensor] = {}
        self._dtype = dtype

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, self._dtype, tuple(t.shape)) for name, t in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.detach().to(self._dtype)


class _Workers:
    """vLLM's `VLLMWeightSyncClient`: what the trainer's end asks for, every worker does."""

    def __init__(self, weights: _Weights, timeout_s: float) -> None:
        self.handles: list[Any] = []
        self.push: Push | None = None
        self.failed: Callable[[BaseException], None] = lambda error: None
        self._weights, self._timeout_s = weights, timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let them meet the trainer, whose rank in NCCL's group is 0."""
        infos = [dict(init_info) for _ in self.handles]
        if "rank_offset" in init_info:  # each is a vLLM of its own, and the first there
            for rank, info in enumerate(infos, start=1):
                info["rank_offset"] = rank
        self._each("transfer", [("meet", info) for info in infos])

    def start_weight_update(self) -> None:
        """Announce what comes: a wrong push is refused before anyone waits for it."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self._weights.tensors.items()}
        self._each("transfer", [("start", shapes)] * len(self.handles))

    def update_weights(self, update_info: Any) -> None:
        """Let them receive, while the trainer's end sends."""
        self._each("transfer", [("receive", update_info)] * len(self.handles))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let them compute with what they received."""
        self._each("transferred", [(self.push,)] * len(self.handles))

    def _each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        import ray

        pairs = zip(self.handles, arguments, strict=True)
        calls = [getattr(handle, method).remote(*given) for handle, given in pairs]
        try:
            ray.get(calls, timeout=self._timeout_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, AtelierError):
                cause = _refusal(f"a rollout worker could not take its weights: {cause}")
            raise self._told(cause) from None
        except ray.exceptions.RayError as error:
            told = f"a rollout worker was lost while it got its weights: {error}"
            fix = "`atelier resume` goes on; rollout.vllm.weight_transfer=ray survives such a loss."
            raise self._told(RunError(f"{told}\n    Fix: {fix}")) from None

    def _told(self, error: BaseException) -> BaseException:
        self.failed(error)
        return error


def _refusal(told: str) -> RunError:
    fix = "rollout.vllm.weight_transfer=ray, which goes through host memory."
    return RunError(f"{told}\n    Fix: {fix}")
