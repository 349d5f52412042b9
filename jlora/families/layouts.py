"""Conversions, in both directions, of tensors that llama.cpp lays out differently from the Hub."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.families.family import Delta, Latent


class Sizes(NamedTuple):
    """The sizes of a model that layouts depend on.

    Attributes:
        queries, keys: the numbers of heads; there are as many of values as of keys.
        delta, latent: those of gated delta nets and of latent attention, if there are any.
    """

    queries: int
    keys: int
    delta: Delta | None = None
    latent: Latent | None = None


Reorder = Callable[[np.ndarray, Sizes], np.ndarray]


class Layout(NamedTuple):
    """One way in which GGUF's layout differs.

    Attributes:
        from_gguf, to_gguf: convert a tensor's values.
        outputs_only: whether it only reorders the outputs of a linear, and so applies to those of its LoRA too.
        inputs_only: the same of its inputs.
        transposed: whether the shape is reversed.
    """

    from_gguf: Reorder
    to_gguf: Reorder
    outputs_only: bool = False
    inputs_only: bool = False
    transposed: bool = False


def _only(parts: Sequence[Any], sizes: Sizes) -> Any:
    return parts[0]


def _alone(values: Any, sizes: Sizes) -> tuple[Any, ...]:
    return (values,)


class Joined(NamedTuple):
    """A tensor of the Hub's that GGUF splits into several, or names in a way that follows from no module's name.

    Functions take arrays of NumPy and of JAX: shapes are found by tracing them.

    Attributes:
        name: the Hub's name in a layer.
        parts: GGUF's names in a layer.
        join: (the parts' values, sizes) → the Hub's.
        split: the inverse.
        rows: whether these only sort the outputs of linears, and so those of their LoRA too.
        turned: whether the Hub has the last two axes in the other order.
    """

    name: str
    parts: tuple[str, ...]
    join: Callable[[Sequence[Any], Sizes], Any] = _only
    split: Callable[[Any, Sizes], tuple[Any, ...]] = _alone
    rows: bool = True
    turned: bool = False

    def made(self, parts: Sequence[Any], sizes: Sizes) -> Any:
        """The Hub's values, of the parts'."""
        values = self.join(parts, sizes)
        return values.swapaxes(-1, -2) if self.turned else values

    def taken(self, values: Any, sizes: Sizes) -> tuple[Any, ...]:
        """The parts' values, of the Hub's."""
        return self.split(values.swapaxes(-1, -2) if self.turned else values, sizes)


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


QUERIES = Layout(lambda x, sizes: _halves(x, sizes.queries), lambda x, sizes: _interleaved(x, sizes.queries), True)
KEYS = Layout(lambda x, sizes: _halves(x, sizes.keys), lambda x, sizes: _interleaved(x, sizes.keys), True)
FUSED = Layout(lambda x, sizes: _by_head(x, sizes.queries), lambda x, sizes: _by_kind(x, sizes.queries), True)
# Gemma's norms multiply by 1 + weight, and the file holds that sum.
SUM = Layout(lambda x, sizes: x - 1, lambda x, sizes: x + 1)
TURNED = Layout(lambda x, sizes: x.T, lambda x, sizes: x.T, transposed=True)

# (pattern of GGUF's tensor names, layout)
INTERLEAVED = ((r"blk\.\d+\.attn_q\.(weight|bias)", QUERIES), (r"blk\.\d+\.attn_k\.(weight|bias)", KEYS))
PLUS_ONE = ((r".*norm\.weight", SUM),)
CONV1D = ((r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", TURNED),)
BY_KIND = ((r"blk\.\d+\.attn_qkv\.(weight|bias)", FUSED),)

# ---------------------------------------------------------------- experts that the Hub has in one tensor [E, …]


def _interleave(parts: Sequence[Any], sizes: Sizes) -> Any:
    """Rows of both [E, F, …] in turns: [E, 2·F, …]."""
    both = parts[0].__array_namespace__().stack(parts, axis=2)
    return both.reshape(both.shape[0], -1, *both.shape[3:])


def _in_turns(values: Any, sizes: Sizes) -> tuple[Any, ...]:
    return values[:, 0::2], values[:, 1::2]


def _follow(parts: Sequence[Any], sizes: Sizes) -> Any:
    """Rows of both [E, F, …], one part after the other: [E, 2·F, …]."""
    return parts[0].__array_namespace__().concat(parts, axis=1)


def _in_halves(values: Any, sizes: Sizes) -> tuple[Any, ...]:
    half = values.shape[1] // 2
    return values[:, :half], values[:, half:]


GATES = ("ffn_gate_exps", "ffn_up_exps")


def stacked_experts(where: str, *, turned: bool = False, biased: bool = False) -> tuple[Joined, ...]:
    """The experts of a layer.

    Args:
        where: the Hub's name of the module that holds them.
        turned: whether each kernel is [in, out] there, with gate and up in turns.
        biased: whether they have biases.
    """
    join, split = (_interleave, _in_turns) if turned else (_follow, _in_halves)
    kernels = (
        Joined(f"{where}.gate_up_proj", tuple(f"{part}.weight" for part in GATES), join, split, turned=turned),
        Joined(f"{where}.down_proj", ("ffn_down_exps.weight",), turned=turned),
    )
    biases = (
        Joined(f"{where}.gate_up_proj_bias", tuple(f"{part}.bias" for part in GATES), join, split),
        Joined(f"{where}.down_proj_bias", ("ffn_down_exps.bias",)),
    )
    return kernels + (biases if biased else ())
