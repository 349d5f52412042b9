"""What every packed value can do, and the same questions answered for plain arrays."""

import abc
import math
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from jlora.kernels.device import target

# A CPU recovers nested scales one by one, in a sixth of the time that a product with one row takes. Accelerators do it
# side by side, and lack the 0.37 bits a weight that the recovered ones need.
SCALES_RECOVERED_ONCE = {"cpu"}

# Where a byte holds two neighbouring rows, bringing both to their places takes a TPU several times as long as the
# product. It fuses two products, each with every other row, with the dequantisation, and stores nothing.
NEIGHBOURS_SPLIT = {"tpu"}


class PackedArray(abc.ABC):
    """An array [..., D, N] kept in fewer bits.

    A subclass is a frozen dataclass registered as a pytree, whose parts may also be ShapeDtypeStructs, shardings, or
    whatever else JAX puts in place of an array. It slices, scans and shards as the array would, because
      - every part begins with the array's leading axes, so one layer of a stack is that layer of every part;
      - parts of the array's rank have its axis order, so what splits D or N splits them in the same way.

    Attributes:
        format: a name in `jlora.quant.FORMATS`.
        dtype: the dtype that the array's values are rounded to.
        packs_update: whether an update is added before packing (`jlora.quant.Rounded`), and not to what a product with
            the packed values gives.
    """

    format: str
    dtype: np.dtype
    packs_update: ClassVar[bool] = False
    # Otherwise Python would iterate by indexing, past the end.
    __iter__ = None

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""

    @abc.abstractmethod
    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
        """The array; see `dequantize`."""

    def strided(self, dtype: jax.typing.DTypeLike | None = None) -> tuple[Float[Array, "*stack d N"], ...]:
        """The array in n parts, of which the first holds its rows 0, n, 2n …, the next 1, n + 1, 2n + 1 … and so on.

        n is what the device is quickest with: 1, or 2 where a byte holds two rows.
        """
        return (self.dense(dtype),)

    def base(self) -> Float[Array, "*stack D N"]:
        """The array that updates are added to."""
        return self.dense()

    def stored(self) -> "PackedArray":
        """The packed form that a merged model keeps."""
        return self

    def with_scales(self) -> "PackedArray":
        """The same values in a form that is larger and quicker to dequantise, if there is one: its scales recovered."""
        return self

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> "PackedArray":
        """The value at `index` of the leading axes."""
        return jax.tree.map(lambda part: part[index], self)


def format_of(leaf: Any) -> str | None:
    """The format of a packed value; None for an array."""
    return leaf.format if isinstance(leaf, PackedArray) else None


def is_packed(leaf: Any) -> bool:
    """Whether the leaf is a packed value rather than an array."""
    return format_of(leaf) is not None


def packs_update(leaf: Any) -> bool:
    """Whether an update is added to the leaf before it is packed, so that a product is one with the packed sum."""
    return is_packed(leaf) and leaf.packs_update


def dequantize(leaf: PackedArray, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
    """The array [..., D, N] that a packed value stands for, computed in float32 and rounded once, to the leaf's dtype.

    Args:
        dtype: the dtype that holds the rounded values, if not the leaf's.
    """
    return leaf.dense(dtype)


def splits_neighbours() -> bool:
    """Whether the device multiplies with every other row at a time, where a byte holds two rows."""
    return target() in NEIGHBOURS_SPLIT


def with_scales(params: Any) -> Any:
    """Params to read many times over: packed ones with their scales recovered once, where that is worth its memory."""
    if target() not in SCALES_RECOVERED_ONCE:
        return params
    return jax.tree.map(lambda leaf: leaf.with_scales() if is_packed(leaf) else leaf, params, is_leaf=is_packed)


def unpacked(leaf: Any) -> Any:
    """The array that updates are added to: a packed value dequantised, a `Rounded`'s own array, or an array itself."""
    return leaf.base() if is_packed(leaf) else leaf


def stored(leaf: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
    """What a merged model keeps of a leaf: a packed value's packed form, or an array in `dtype` (None: its own)."""
    if is_packed(leaf):
        return leaf.stored()
    return leaf if dtype is None else leaf.astype(dtype)
