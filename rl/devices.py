"""Which device a process of a run computes on."""

import torch
from transformers import TrainingArguments

from common.errors import RunError
from common.processes import local_rank
from common.progress import Progress


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
