"""Kernels that are packed whenever they are used, so that training sees the packed sum of base and update."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.quant.formats import quantize
from jlora.quant.packed import PackedArray


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["format", "double_quant"])
@dataclasses.dataclass(frozen=True)
class Rounded(PackedArray):
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
    packs_update: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
        return self.stored().dense(dtype)

    def base(self) -> Float[Array, "*stack D N"]:
        return self.array

    def stored(self) -> PackedArray:
        return quantize(self.array, self.format, double_quant=self.double_quant)

    def summed(self, array: Float[Array, "*stack D N"]) -> "Rounded":
        """The kernel with `array`, the sum of its own array and an update, as its values."""
        return dataclasses.replace(self, array=array)

    def used(self, array: Float[Array, "*stack D N"]) -> Float[Array, "*stack D N"]:
        """The values that a product uses if `array` is the sum of the kernel and an update.

        Gradients pass through to the sum (Bengio et al. 2013).
        """
        return _straight_through(array, self.format, self.double_quant)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _straight_through(array: jax.Array, format: str, double_quant: bool) -> jax.Array:
    return Rounded(array, format, double_quant).dense()


def _forward(array: jax.Array, format: str, double_quant: bool) -> tuple[jax.Array, None]:
    return _straight_through(array, format, double_quant), None


def _backward(format: str, double_quant: bool, residuals: None, grad: jax.Array) -> tuple[jax.Array]:
    return (jnp.asarray(grad),)


_straight_through.defvjp(_forward, _backward)
