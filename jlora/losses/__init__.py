"""Losses: pure functions on arrays."""

from jlora.losses.cross_entropy import TokenSums, cross_entropy

__all__ = ["TokenSums", "cross_entropy"]
