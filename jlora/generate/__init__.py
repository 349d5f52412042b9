"""Text from a model: batched decoding with a KV cache, greedy or sampled."""

from jlora.generate.decode import decode
from jlora.generate.sampling import sample
from jlora.generate.text import generate

__all__ = ["decode", "generate", "sample"]
