"""Which device a process of a run computes on, and that it does so alike each time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainingArguments

from common.errors import RunError
from common.journal import Journal, read_journal
from common.processes import local_rank, process_count
from common.progress import Progress
from evals.environment import processor
from recipes.schema_grpo import GrpoRecipe


def training_device(wanted: str) -> str:
    """Return the device for `auto`, `cpu` or `cuda`: under torchrun, GPU i for process i.

    The GPU also becomes the current one, before anything is loaded. Raises RunError if there are
    fewer GPUs than processes.
    """
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not count):
        return "cpu"
    number = local_rank()
    if number >= count:
        raise RunError(
            f"process {number} of this machine has no GPU: {count} are visible.\n"
            "    Fix: start as many processes as there are GPUs, or set policy.device to cpu."
        )
    device = f"cuda:{number}"
    torch.cuda.set_device(device)
    return device


@contextmanager
def repeatable_sums(device: torch.device) -> Iterator[None]:
    """Inside, what is computed on the CPU can be computed again to the last bit.

    On several threads some of torch's sums (mostly the gradient of an index) are otherwise added up
    in whatever order the threads come. On a GPU nothing changes: not all kernels have the choice.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        # Warnings where a kernel has no choice, no errors: rewards compute in here as well.
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def use_one_gpu(arguments: TrainingArguments, progress: Progress) -> None:
    """Keep a process on its one GPU, and say so if there are more.

    transformers would spread each batch with nn.DataParallel over all that are visible, which
    neither the joint loss nor the rollouts are made for.
    """
    if arguments.n_gpu > 1:
        progress.line(
            f"using one of {arguments.n_gpu} GPUs; `torchrun --nproc_per_node {arguments.n_gpu} "
            "-m cli train ...` uses all"
        )
        arguments._n_gpu = 1


def note_devices(journal: Journal, recipe: GrpoRecipe, device: torch.device, step: int) -> None:
    """Write which devices a run computes on from `step` on, where the journal does not say so yet.

    `count` is of GPUs, those of all workers among them; of processes, workers among them, if none
    has a GPU. The GPUs of workers are taken to be of the trainer's kind.
    """
    stages = (recipe.rollout, recipe.decode, recipe.rewards)
    on_gpu = device.type == "cuda"
    gpus = sum(stage.workers * stage.ray.gpus_per_worker for stage in stages)
    if on_gpu:
        gpus += process_count()
        name = torch.cuda.get_device_name(device)
    else:
        name = "the workers' machines" if gpus else processor()
    row = {
        "event": "devices",
        "kind": "GPU" if gpus else "CPU",
        "device": name,
        "count": gpus or process_count() + sum(stage.workers for stage in stages),
    }
    told = [old for old in read_journal(journal.path) if old.get("event") == "devices"]
    if not told or {**told[-1], "step": step} != {**row, "step": step}:
        journal.write({**row, "step": step})
