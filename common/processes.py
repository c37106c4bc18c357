"""Which of the processes of a run this one is, as torchrun tells them."""

import os


def is_main_process() -> bool:
    """Return whether this process is alone or, under torchrun, the first of its run."""
    return os.environ.get("RANK", "0") == "0"
