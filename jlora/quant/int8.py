"""Packed 8-bit arrays as a pytree: one scale for each output, as LLM.int8 (Dettmers et al. 2022) stores weights.

Invariants of a `PackedInt8` of logical shape [..., D, N]: codes have that shape, and scale keeps its rank, so that
sharding N shards both.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.quant.packed import PackedArray
from jlora.quant.scales import rounded_to

# bitsandbytes multiplies by this instead of dividing by 127.
STEP = np.float32(7.874015718698502e-3)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class PackedInt8(PackedArray):
    """A packed array; see the module's invariants.

    Attributes:
        codes: int8 [..., D, N], -127 … 127.
        scale: float32 [..., 1, N], the largest magnitude of each output's weights (bitsandbytes' SCB).
        dtype: the dtype that dequantised values are rounded to.
    """

    codes: Any
    scale: Any
    dtype: np.dtype
    format: ClassVar[str] = "int8"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dense(self, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
        return unpack(self, dtype)


@functools.partial(jax.jit, static_argnames=("double_quant",))
def pack(array: Float[Array, "*stack D N"], *, double_quant: bool) -> PackedInt8:
    """The packed form of kernels: round(W · 127/scale) of the values rounded to float16.

    Equal to `bitsandbytes.functional.int8_vectorwise_quant(kernel.T.half())` on a CPU. An output of zeros has codes 0.

    Args:
        double_quant: has no effect, as there are no block scales.
    """
    half = rounded_to(array, jnp.float16, jnp.float32)
    scale = jnp.max(jnp.abs(half), axis=-2, keepdims=True)
    # 127/scale is rounded as in torch, which takes the reciprocal first.
    factor = (1.0 / jnp.where(scale == 0, 1.0, scale)) * 127.0
    codes = jnp.round(half * factor).astype(jnp.int8)
    return PackedInt8(codes, scale, np.dtype(array.dtype))


@functools.partial(jax.jit, static_argnames=("dtype",))
def unpack(leaf: PackedInt8, dtype: jax.typing.DTypeLike | None = None) -> Float[Array, "*stack D N"]:
    """The kernels that a packed value stands for: codes · scale / 127 in float32, rounded once to the leaf's dtype."""
    values = leaf.codes.astype(jnp.float32) * leaf.scale * STEP
    return rounded_to(values, leaf.dtype, dtype)
