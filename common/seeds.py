"""Seeds as counters: every random draw names what it is for, so nothing has to be remembered.

A resumed run repeats the uninterrupted one because no generator state exists that could be lost.
"""

import hashlib


def counter_seed(run_seed: int, stage: str, *counters: int | str) -> int:
    """Return a 63-bit seed that depends on every argument and on nothing else.

    `stage` says what is drawn ("tokens", "noise", "prompts"), `counters` where in the run:
    step, prompt id, sample index.
    """
    text = "\x1f".join([str(run_seed), stage, *(f"{type(c).__name__}:{c}" for c in counters)])
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
