"""Which of the processes of a run this one is, as torchrun tells them."""

import os


def is_main_process() -> bool:
    """Return whether this process is alone or, under torchrun, the first of its run."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Return the number of this process among those of its run on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def process_count() -> int:
    """Return how many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))
