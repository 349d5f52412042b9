"""Conversions, in both directions, of tensors that llama.cpp lays out differently from the Hub."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Heads(NamedTuple):
    """The numbers of heads; there are as many of values as of keys."""

    queries: int
    keys: int


Reorder = Callable[[np.ndarray, Heads], np.ndarray]


class Layout(NamedTuple):
    """One way in which GGUF's layout differs.

    Attributes:
        from_gguf, to_gguf: convert a tensor's values.
        outputs_only: whether it only reorders the outputs of a linear, and so applies to those of its LoRA too.
        transposed: whether the shape is reversed.
    """

    from_gguf: Reorder
    to_gguf: Reorder
    outputs_only: bool = False
    transposed: bool = False


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (h, half, f) reordered to (h, f, half): from the Hub's two halves to interleaved rotary pairs."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _by_kind(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (h, 3, f) reordered to (3, h, f): from head by head to all queries, all keys, all values."""
    return values.reshape(heads, 3, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)


def _by_head(values: np.ndarray, heads: int) -> np.ndarray:
    return values.reshape(3, heads, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)


QUERIES = Layout(lambda x, heads: _halves(x, heads.queries), lambda x, heads: _interleaved(x, heads.queries), True)
KEYS = Layout(lambda x, heads: _halves(x, heads.keys), lambda x, heads: _interleaved(x, heads.keys), True)
FUSED = Layout(lambda x, heads: _by_head(x, heads.queries), lambda x, heads: _by_kind(x, heads.queries), True)
# Gemma's norms multiply by 1 + weight, and the file holds that sum.
SUM = Layout(lambda x, heads: x - 1, lambda x, heads: x + 1)
TURNED = Layout(lambda x, heads: x.T, lambda x, heads: x.T, transposed=True)

# (pattern of GGUF's tensor names, layout)
INTERLEAVED = ((r"blk\.\d+\.attn_q\.(weight|bias)", QUERIES), (r"blk\.\d+\.attn_k\.(weight|bias)", KEYS))
PLUS_ONE = ((r".*norm\.weight", SUM),)
CONV1D = ((r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", TURNED),)
BY_KIND = ((r"blk\.\d+\.attn_qkv\.(weight|bias)", FUSED),)
