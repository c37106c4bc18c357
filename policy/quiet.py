"""What the model libraries say: no bars and chatter, and errors that name the file."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import PolicyError

_LOGGERS = ("transformers", "diffusers", "accelerate", "peft", "trl")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, the model libraries report errors only and draw no bars; then all is as before.

    Warnings raised through `warnings` and the output of everybody else pass.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (transformers_logging, diffusers_logging)
    bars = [library.is_progress_bar_enabled() for library in libraries]
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    # accelerate imports DeepSpeed on the way, which sets its own level and writes to stdout.
    deepspeed = logging.getLogger("DeepSpeed")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for library in libraries:
        library.disable_progress_bar()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    deepspeed.addFilter(is_error)
    try:
        yield
    finally:
        deepspeed.removeFilter(is_error)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for library, enabled in zip(libraries, bars, strict=True):
            if enabled:
                library.enable_progress_bar()


@contextmanager
def refused_as(what: str, fix: str) -> Iterator[None]:
    """Turn what a library raises of bad input, which has no common error, into a PolicyError.

    Too little memory and a package that is not there are no faults of the input.
    """
    try:
        yield
    except (PolicyError, MemoryError, ImportError):
        raise
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise PolicyError(f"{what}: {told}\n    Fix: {fix}") from error
