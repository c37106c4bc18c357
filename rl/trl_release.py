"""TRL's GRPO classes, imported without TRL's own vLLM client.

TRL imports vLLM wherever it is installed, which takes seconds, changes the process and warns that
this vLLM is newer than the ones its client was written for. That client is never used here: the
rollout engines are ours.
"""

import trl.import_utils as trl_imports

_asked = trl_imports.is_vllm_available
trl_imports.is_vllm_available = lambda *args, **kwargs: False
try:
    from trl import GRPOConfig, GRPOTrainer
finally:
    trl_imports.is_vllm_available = _asked

__all__ = ["GRPOConfig", "GRPOTrainer"]
