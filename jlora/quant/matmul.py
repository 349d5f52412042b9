"""The product of activations with a kernel, dense or packed (then dequantised again in the backward pass)."""

import jax
from jaxtyping import Array, Float

from jlora.quant.nf4 import NF4Array, dequantize


def matmul(x: Float[Array, "*batch D"], kernel: "Float[Array, 'D N'] | NF4Array") -> Float[Array, "*batch N"]:
    """x @ kernel in x's dtype. With a packed kernel only x's gradient exists; nothing dequantised is kept."""
    # One flat row axis: XLA's CPU backend is slow on products contracted over, or batched by, several axes.
    rows = x.reshape(-1, x.shape[-1])
    y = _packed(rows, kernel) if isinstance(kernel, NF4Array) else rows @ kernel.astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _packed(x: jax.Array, kernel: NF4Array) -> jax.Array:
    return x @ dequantize(kernel, x.dtype)


def _packed_forward(x: jax.Array, kernel: NF4Array) -> tuple[jax.Array, NF4Array]:
    return _packed(x, kernel), kernel


def _packed_backward(kernel: NF4Array, grad: jax.Array) -> tuple[jax.Array, None]:
    return grad @ dequantize(kernel, grad.dtype).T, None


_packed.defvjp(_packed_forward, _packed_backward)
