"""Weights by vLLM's own transfer: its two ends for real, in Ray actors; only NCCL's wire is ours.

No test has a GPU. vLLM's sender, its receivers in two real CPU engines and their reload run as they
are; the communicator that NCCL would be is replaced by the TCP store that NCCL meets through.
"""

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_networks import tiny_qwen3

from common.errors import RecipeError, RunError
from common.heavy import prepare_torchvision
from recipes import load_recipe
from rl import memory
from rl.stages import Journaled, build_engine
from rollout import Sampling, WeightMismatch, fingerprint_tensors
from rollout.build import EngineSpec
from rollout.cluster import Placement, ray_cluster
from rollout.ray_pool import RayPool
from rollout.sync import ModelSide, push_weights, verify_sync
from rollout.weight_transfer import WeightTransfer
from rollout.weights import merged_tensors

prepare_torchvision()

START, IMAGES, LENGTH = 300, 64, 12
PROMPTS = [[1, 2, 3], list(range(50, 95))]
SEEDS = list(range(4))


class Wire:
    """A communicator as vLLM uses it: whoever sends waits until all have received, as NCCL does."""

    def __init__(self, group) -> None:
        self.group, self.count = group, 0

    def broadcast(self, tensor, src, stream=None) -> None:
        group, self.count = self.group, self.count + 1
        received = group.broadcast(tensor, src)
        if group.rank == src:
            others = [rank for rank in range(group.world_size) if rank != src]
            group.store.wait([f"received/{self.count}/{rank}" for rank in others])
        else:
            tensor.copy_(received)
            group.store.set(f"received/{self.count}/{group.rank}", b"1")

    def destroy(self) -> None:
        self.group = None


class Stream:
    def synchronize(self) -> None: ...


def met(master_address, master_port, rank, world_size, device) -> Wire:
    from vllm.distributed.utils import StatelessProcessGroup

    return Wire(StatelessProcessGroup.create(master_address, master_port, rank, world_size))


def replace_nccl(patch: pytest.MonkeyPatch) -> None:
    """Put what only a GPU has out of vLLM's way."""
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor

    patch.setattr(nccl_common, "stateless_init_process_group", met)
    patch.setattr(packed_tensor, "_get_streams", lambda device, count: (Stream(),) * count)
    patch.setattr(torch.accelerator, "current_device_index", lambda: 0)


def build(spec: EngineSpec, events):
    engine = spec.build(events)
    replace_nccl(pytest.MonkeyPatch())
    return engine


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Iterator[RayPool]:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = tmp_path_factory.mktemp("ar")
    tiny_qwen3().save_pretrained(folder)
    spec = EngineSpec(
        "vllm", str(folder), START, IMAGES, LENGTH, 0, "float32", 64, cache_gib=0.1,
        weight_transfer="nccl",
    )  # fmt: skip
    place = Placement("rollout", 2, timeout_s=240)
    with ray_cluster(None, [place]), pytest.MonkeyPatch.context() as patch:
        made = partial(build, spec)
        pool = RayPool(made, place, torch.float32, [], [], weight_transfer="nccl")
        replace_nccl(patch)
        pool.actors.await_ready()
        yield pool
        pool.close()


def side(factor: float, step: int = 1) -> ModelSide:
    model = tiny_qwen3()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    made = ModelSide(model, step, PROMPTS, START, IMAGES)
    made.model = model
    return made


def in_worker(pool: RayPool, index: int, function, *arguments):
    import ray

    return ray.get(pool.actors.handles[index].__ray_call__.remote(function, *arguments))


def test_weights_reach_every_worker_and_nothing_is_stored(pool):
    for step, factor in enumerate([1.01, 0.98]):
        trainer = side(factor, step)
        verify_sync(pool, trainer)
        expected = fingerprint_tensors(merged_tensors(trainer.model))
        for index in range(2):
            assert in_worker(pool, index, lambda w: w.engine.fingerprint()) == expected
            assert in_worker(pool, index, lambda w: w.engine.step) == step
    assert pool._push.packed == []


def test_a_wrong_push_is_refused_before_anyone_waits_for_it(pool):
    push_weights(pool, side(1.0))
    tensors = list(merged_tensors(side(1.1).model))
    for wrong in [tensors[:-1], [*tensors, ("more", torch.zeros(1))]]:
        with pytest.raises(WeightMismatch, match="not all the weights of the vllm engine"):
            pool.load_weights(wrong, 2)
    push_weights(pool, side(1.1, 3))


def test_plans_count_vllm_s_buffers():
    from vllm.distributed.weight_transfer import packed_tensor
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info = NCCLTrainerInitInfo(rank=0, master_address="", master_port=1, world_size=2)
    assert info.packed  # what the trainer says, workers do
    assert info.packed_buffer_size_bytes == memory.TRANSFER_BUFFER
    assert info.packed_num_buffers == memory.TRANSFER_BUFFERS
    tensors = iter([(str(i), torch.zeros(6, dtype=torch.uint8)) for i in range(4)])
    chunk = packed_tensor.pack_tensors(tensors, lambda pair: pair[1], 10)
    assert chunk.packed_tensor.numel() == 12  # full with the tensor that exceeds it


def receive_nothing(worker) -> None:
    """Take part, and keep what was there before."""
    original = worker.engine.transfer

    def transfer(call, argument) -> None:
        held = [(n, t.clone()) for n, t in worker.engine._weights()] if call == "start" else None
        original(call, argument)
        if held:
            worker.held = held
        if call == "finish":
            worker.engine._reload(dict(worker.held))

    worker.engine.transfer = transfer


def restore(worker) -> None:
    del worker.engine.transfer


def test_a_worker_that_keeps_its_weights_stops_the_run(pool):
    push_weights(pool, side(1.0))
    in_worker(pool, 1, receive_nothing)
    with pytest.raises(
        WeightMismatch, match=r"rollout workers hold different weights .*: \[0\]; \w+: \[1\]\)"
    ):
        push_weights(pool, side(1.001, 2))
    in_worker(pool, 1, restore)
    push_weights(pool, side(1.001, 3))


def die_at_next_generate(worker) -> None:
    worker.engine.generate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_who_replaces_a_lost_worker_reads_the_store_and_then_meets_the_others(pool):
    trainer = side(1.02, 4)
    push_weights(pool, trainer)
    expected = pool.generate(PROMPTS, 2, Sampling(), SEEDS)
    in_worker(pool, 1, die_at_next_generate)
    found = pool.generate(PROMPTS, 2, Sampling(), SEEDS)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert len(pool._push.packed) == 1
    pool.actors.await_ready()
    assert pool.fingerprint() == fingerprint_tensors(merged_tensors(trainer.model))
    verify_sync(pool, side(1.03, 5))
    assert pool._push.packed == []


def replace_ipc(patch: pytest.MonkeyPatch) -> None:
    """A handle of CUDA's shared memory is the array itself."""
    from vllm.distributed.weight_transfer import ipc_engine

    card = SimpleNamespace(uuid="GPU-0")
    patch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    patch.setattr(torch.cuda, "ipc_collect", lambda: None)
    patch.setattr(ipc_engine, "reduce_tensor", lambda t: (None, (t.numpy(), *[None] * 6)))
    patch.setattr(ipc_engine, "rebuild_cuda_tensor", lambda array, *_: torch.tensor(array))


def receive_by(worker, backend: str) -> None:
    def switch(wrapper) -> None:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        inside = wrapper.worker
        settings, model = inside.vllm_config, inside.model_runner.get_model()
        inside.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend), settings, inside.device, model
        )

    worker.engine._llm.collective_rpc(switch)
    replace_ipc(pytest.MonkeyPatch())


def test_workers_on_the_trainers_gpu_read_its_memory(pool, monkeypatch):
    replace_ipc(monkeypatch)
    pool._transfer.close()
    monkeypatch.setattr(pool, "_transfer", WeightTransfer("ipc", torch.float32, 240))
    for index in range(2):
        in_worker(pool, index, receive_by, "ipc")
    for step, factor in enumerate([1.04, 1.05], start=6):
        verify_sync(pool, side(factor, step))
    assert pool._push.packed == []
    for index in range(2):
        in_worker(pool, index, receive_by, "nccl")


def test_who_was_lost_between_two_pushes_costs_no_run(pool):
    pool.actors.await_ready()
    push_weights(pool, side(1.0, 8))
    replaced = pool.actors.replaced
    os.kill(in_worker(pool, 0, lambda worker: os.getpid()), signal.SIGKILL)
    trainer = side(1.06, 9)
    verify_sync(pool, trainer)  # to who is left, and into the store for who comes
    assert pool.actors.replaced == replaced + 1
    assert len(pool._push.packed) == 1
    pool.actors.await_ready()
    expected = fingerprint_tensors(merged_tensors(trainer.model))
    assert pool.fingerprint() == expected
    assert in_worker(pool, 0, lambda w: w.engine.fingerprint()) == expected
    push_weights(pool, side(1.07, 10))
    assert pool._push.packed == []


def fail(worker) -> None:
    def transfer(call, argument) -> None:
        raise ValueError("no handle for this GPU")

    worker.engine.transfer = transfer


def test_what_fails_in_a_worker_is_told_with_a_fix(pool):
    pool.actors.await_ready()
    for index in range(2):
        in_worker(pool, index, fail)
    told = r"could not take its weights: no handle for this GPU\n +Fix: .*weight_transfer=ray"
    with pytest.raises(RunError, match=told):
        push_weights(pool, side(1.0, 11))
    for index in range(2):
        in_worker(pool, index, restore)


def die_while_receiving(worker) -> None:
    original = worker.engine.transfer

    def transfer(call, argument) -> None:
        if call == "receive":
            os.kill(os.getpid(), signal.SIGKILL)
        original(call, argument)

    worker.engine.transfer = transfer


def test_a_worker_lost_in_the_middle_ends_the_run_instead_of_hanging(pool):
    """The last test: the other worker and the sender wait for ever."""
    push_weights(pool, side(1.0, 6))
    in_worker(pool, 0, die_while_receiving)
    with pytest.raises(
        RunError, match=r"lost while it got its weights[\s\S]*Fix: `atelier resume`"
    ):
        push_weights(pool, side(1.01, 7))


NCCL = [
    "rollout.engine=vllm",
    "rollout.workers=2",
    "rollout.ray.gpus_per_worker=1",
    "rollout.ray.address=auto",
    "rollout.vllm.weight_transfer=nccl",
]
IPC = ["rollout.vllm.weight_transfer=ipc", "rollout.ray.gpus_per_worker=0.5"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["rollout.workers=0"], "set rollout.workers, gpus_per_worker to 1"),
        (["rollout.ray.gpus_per_worker=0.5"], "a GPU for each worker"),
        (["rollout.ray.address=null"], "none of them the trainer's"),
        (["rollout.max_policy_lag=1"], "set rollout.max_policy_lag to 0"),
        ([*IPC, "rollout.workers=0"], "share with the trainer"),
        ([*IPC, "rollout.workers=3"], "let all of them take one GPU"),
        ([*IPC, "rollout.ray.gpus_per_worker=0"], "share with the trainer"),
    ],
)
def test_recipes_for_which_it_is_no_way_are_refused(settings, told):
    load_recipe("geneval-scenes", NCCL)
    load_recipe("geneval-scenes", [*NCCL, *IPC])
    with pytest.raises(RecipeError, match=r"rollout\.vllm\.weight_transfer") as error:
        load_recipe("geneval-scenes", [*NCCL, *settings])
    assert told in " ".join(str(error.value).split())


def test_a_trainer_without_a_gpu_is_told_before_workers_start(policy):
    given = [
        "rollout.engine=vllm",
        "rollout.workers=1",
        "rollout.ray.gpus_per_worker=0.5",
        "rollout.vllm.weight_transfer=ipc",
    ]
    recipe = load_recipe("geneval-scenes", given).recipe
    place = Placement("rollout", 1, gpus=0.5)
    with pytest.raises(RunError, match=r"weight_transfer: ipc sends from GPU to GPU"):
        build_engine(recipe, policy, 64, place, Journaled())
