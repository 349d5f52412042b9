"""Text generation, greedy or sampled: decoding with a KV cache and rows that are refilled as sequences finish."""

from jlora.generate.decoding import Decoded, decode
from jlora.generate.rollouts import Completion, Rollout, policy_digest, rollout
from jlora.generate.sampling import log_prob, sample
from jlora.generate.text import generate

__all__ = [
    "Completion",
    "Decoded",
    "Rollout",
    "decode",
    "generate",
    "log_prob",
    "policy_digest",
    "rollout",
    "sample",
]
