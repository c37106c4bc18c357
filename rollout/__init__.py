"""Sampling image tokens: engines behind one protocol, and proof that new weights arrived.

Importing the package imports torch, never vllm: each engine lives in its own module.
"""

from policy.sampling import Sampling
from rollout.engine import Engine, RolloutBatch, WeightMismatch, fingerprint_tensors

__all__ = ["Engine", "RolloutBatch", "Sampling", "WeightMismatch", "fingerprint_tensors"]
