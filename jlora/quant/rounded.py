"""Kernels that are packed whenever they are used, so that training sees the packed sum of base and update."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.quant import four_bit, int8


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["format", "double_quant"])
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A kernel [..., D, N] in 16 or 32 bits that computes what its packed form does.

    An adapter's update is added to the array before packing (`jlora.lora.linear`), and `jlora.lora.merge` returns the
    packed sum.

    Attributes:
        array: the kernel's values.
        format, double_quant: as in `quantize`.
    """

    array: Any
    format: str
    double_quant: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def ndim(self) -> int:
        return len(self.array.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.array.shape))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def packed(self, array: Float[Array, "*stack D N"] | None = None) -> four_bit.Packed4bit | int8.PackedInt8:
        """The packed form of `array`, by default of the kernel's own."""
        array = self.array if array is None else array
        if self.format == "int8":
            return int8.pack(array)
        return four_bit.pack(array, self.format, double_quant=self.double_quant)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def straight_through(array: jax.Array, format: str, double_quant: bool) -> jax.Array:
    """The array packed and unpacked again; its gradient is passed through to the array (Bengio et al. 2013)."""
    packed = Rounded(array, format, double_quant).packed()
    return int8.unpack(packed, None) if isinstance(packed, int8.PackedInt8) else four_bit.unpack(packed, None)


def _forward(array: jax.Array, format: str, double_quant: bool) -> tuple[jax.Array, None]:
    return straight_through(array, format, double_quant), None


def _backward(format: str, double_quant: bool, residuals: None, grad: jax.Array) -> tuple[jax.Array]:
    return (jnp.asarray(grad),)


straight_through.defvjp(_forward, _backward)
