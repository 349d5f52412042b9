"""A tensor that its checkpoint has packed, whatever packed it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jlora.hub.checkpoints.weights import TensorInfo
from jlora.quant import PackedArray


class Stored(NamedTuple):
    """A packed tensor as its files have it.

    Attributes:
        format: a name in `jlora.quant.FORMATS`.
        matrix: the kernel's (D, N).
        dtype: the dtype that dequantised values are rounded to; None if the files do not say.
        parts: part ("weight", "absmax", …) → (name of its tensor, that tensor's info).
        offset: the offset of nested block scales; None if they are not nested.
        stack: the axes before the kernel's own, of a tensor that holds several.
        read: (the dequantised values' dtype) → the kernel; None: the format's own way reads the parts.
    """

    format: str
    matrix: tuple[int, int]
    dtype: np.dtype | None
    parts: dict[str, tuple[str, TensorInfo]]
    offset: float | None = None
    stack: tuple[int, ...] = ()
    read: Callable[[np.dtype], PackedArray] | None = None

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.parts.values()}

    @property
    def info(self) -> TensorInfo:
        """What a file would say of the tensor if it were not packed.

        A single matrix is [out, in], whatever the layer's class; several are [*stack, in, out].
        """
        file = next(iter(self.parts.values()))[1].file
        return TensorInfo((*self.stack, *self.matrix) if self.stack else self.matrix[::-1], "F32", file)
