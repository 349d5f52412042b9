"""The product of activations with a kernel, dense or packed (then dequantised again in the backward pass)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jlora import sharding
from jlora.kernels import grouped
from jlora.kernels.order import after
from jlora.quant.packed import PackedArray, dequantize, is_packed, splits_neighbours


def matmul(x: Float[Array, "*batch D"], kernel: "Float[Array, 'D N'] | PackedArray") -> Float[Array, "*batch N"]:
    """x @ kernel in x's dtype; sums and a dense kernel's gradient are at least float32.

    A packed kernel gets no gradient, and nothing dequantised is kept.
    """
    # One flat row axis, since XLA's CPU backend is slow on products that contract over or batch several axes; but not
    # if a mesh splits tokens, whose shards would not be contiguous in it.
    rows = x if sharding.ways(sharding.TOKENS) > 1 else x.reshape(-1, x.shape[-1])
    y = _packed(rows, kernel) if is_packed(kernel) else _dense(rows, kernel)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel.astype(x.dtype)


def _dense_forward(x: Any, kernel: Any) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
    """Saves x only if the kernel is trained."""
    return _dense(x.value, kernel.value), (x.value if kernel.perturbed else None, kernel.value)


def _dense_backward(residuals: tuple[jax.Array | None, jax.Array], grad: Any) -> tuple[jax.Array, jax.Array | None]:
    x, kernel = residuals
    if isinstance(grad, SymbolicZero):
        grad = jnp.zeros(grad.shape, grad.dtype)
    grad_x = grad @ kernel.astype(grad.dtype).T
    if x is None:
        return grad_x, None
    grad_kernel = jnp.einsum("...d,...n->dn", x, grad, preferred_element_type=kernel.dtype)
    return grad_x, _summed(grad_kernel, kernel)


_dense.defvjp(_dense_forward, _dense_backward, symbolic_zeros=True)


def _summed(grad: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient summed over the devices that (inside `jax.shard_map`) have rows of their own but the same kernel."""
    axes = _varying(grad) - _varying(kernel)
    return jax.lax.psum(grad, tuple(axes)) if axes else grad


def _varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes along which x differs; the attribute's name depends on JAX's version."""
    kind = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def grouped_matmul(
    x: Float[Array, "rows D"], kernel: "Float[Array, 'E D N'] | PackedArray", sizes: Int[Array, "E"]
) -> Float[Array, "rows N"]:
    """`matmul` with a kernel for each of E groups of consecutive rows; group e has sizes[e] rows."""
    return _packed_groups(x, kernel, sizes) if is_packed(kernel) else _dense_groups(x, kernel, sizes)


def _turned(kernel: "jax.Array | PackedArray", dtype: jnp.dtype) -> jax.Array:
    return jnp.swapaxes(_as_dense(kernel, dtype), -1, -2)


def _as_dense(kernel: "jax.Array | PackedArray", dtype: jnp.dtype) -> jax.Array:
    return dequantize(kernel, dtype) if is_packed(kernel) else kernel.astype(dtype)


def _groups(x: jax.Array, parts: "tuple[jax.Array | PackedArray, ...]", sizes: jax.Array) -> jax.Array:
    return _by_parts(
        x, parts, functools.partial(grouped.product, sizes=sizes, dense=functools.partial(_as_dense, dtype=x.dtype))
    )


def _groups_turned(grad: jax.Array, parts: "tuple[jax.Array | PackedArray, ...]", sizes: jax.Array) -> jax.Array:
    dense = functools.partial(_turned, dtype=grad.dtype)
    return _interleaved([grouped.product(grad, part, sizes, dense) for part in parts])


def _apart(kernel: PackedArray, dtype: jnp.dtype) -> "tuple[jax.Array | PackedArray, ...]":
    """A kernel for every group: dequantised for all of them in parts, or itself, to be dequantised group by group."""
    return kernel.strided(dtype) if splits_neighbours() else (kernel,)


@jax.custom_vjp
def _dense_groups(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    return _groups(x, (kernel,), sizes)


def _dense_groups_forward(x: Any, kernel: Any, sizes: Any) -> tuple[jax.Array, tuple]:
    kept = x.value if kernel.perturbed else None, kernel.value, sizes.value
    return _groups(x.value, (kernel.value,), sizes.value), kept


def _dense_groups_backward(residuals: tuple, grad: Any) -> tuple[jax.Array, jax.Array | None, None]:
    x, kernel, sizes = residuals
    if isinstance(grad, SymbolicZero):
        grad = jnp.zeros(grad.shape, grad.dtype)
    grad_x = _groups_turned(grad, (kernel,), sizes)
    if x is None:
        return grad_x, None, None
    return grad_x, _summed(grouped.outer(x, grad, sizes).astype(kernel.dtype), kernel), None


_dense_groups.defvjp(_dense_groups_forward, _dense_groups_backward, symbolic_zeros=True)


@jax.custom_vjp
def _packed_groups(x: jax.Array, kernel: PackedArray, sizes: jax.Array) -> jax.Array:
    return _groups(x, _apart(kernel, x.dtype), sizes)


def _packed_groups_forward(x: jax.Array, kernel: PackedArray, sizes: jax.Array) -> tuple[jax.Array, tuple]:
    return _packed_groups(x, kernel, sizes), (kernel, sizes)


def _packed_groups_backward(residuals: tuple, grad: jax.Array) -> tuple[jax.Array, None, None]:
    kernel, sizes = residuals
    return _groups_turned(grad, _apart(kernel, grad.dtype), sizes), None, None


_packed_groups.defvjp(_packed_groups_forward, _packed_groups_backward)


@jax.custom_vjp
def _packed(x: jax.Array, kernel: PackedArray) -> jax.Array:
    # Dequantised only when x is ready: XLA might dequantise all of a layer's kernels before its first product.
    kernel, x = after(kernel, x)
    return _by_parts(x, kernel.strided(x.dtype), jnp.matmul)


def _packed_forward(x: jax.Array, kernel: PackedArray) -> tuple[jax.Array, PackedArray]:
    return _packed(x, kernel), kernel


def _packed_backward(kernel: PackedArray, grad: jax.Array) -> tuple[jax.Array, None]:
    kernel, grad = after(kernel, grad)
    return _interleaved([grad @ part.T for part in kernel.strided(grad.dtype)]), None


_packed.defvjp(_packed_forward, _packed_backward)


def _by_parts(x: jax.Array, parts: tuple[Any, ...], product: Callable[..., jax.Array]) -> jax.Array:
    """The product of x with a kernel in parts, each with every so many inputs: the parts' sum, rounded once."""
    if len(parts) == 1:
        return product(x, parts[0])
    every = [x[..., first :: len(parts)] for first in range(len(parts))]
    return sum(map(functools.partial(product, preferred_element_type=jnp.float32), every, parts)).astype(x.dtype)


def _interleaved(parts: list[jax.Array]) -> jax.Array:
    """The gradient of a product's inputs from the parts with every so many of them."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
