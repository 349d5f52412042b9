"""When values are computed: left alone, XLA may compute early, and then keep, what does not depend on earlier steps."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora.kernels.device import target


def after(values: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """(values, x), such that nothing is computed from the values before x is ready.

    Only the smallest array waits, so that what produces the others, such as a layer's slice of a stack, can still be
    fused with what uses them. Since the result depends on x, JAX does not compute it once for all layers either.
    """
    leaves, structure = jax.tree.flatten(values)
    smallest = min(range(len(leaves)), key=lambda i: math.prod(leaves[i].shape))
    leaves[smallest], x = jax.lax.optimization_barrier((leaves[smallest], x))
    leaves[smallest] = leaves[smallest] + _zero(x, leaves[smallest].dtype)
    return jax.tree.unflatten(structure, leaves), x


def constant(value: float, x: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The scalar, but not before x is ready, so that no array it is broadcast to is made before a loop and kept."""
    return jax.lax.optimization_barrier((jnp.asarray(value, dtype), x))[0]


@jax.custom_vjp
def in_turn(first: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, x), such that whatever uses this x is computed after `first`.

    In the backward pass the gradient of `first` comes after that of x and after `first` itself, even if it needs
    neither.
    """
    return jax.lax.optimization_barrier((first, x))


def _in_turn_forward(first: jax.Array, x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    return in_turn(first, x), first


def _in_turn_backward(first: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    first, grad, grad_x = jax.lax.optimization_barrier((first, *grads))
    return grad + _zero(grad_x, grad.dtype) + _zero(first, grad.dtype), grad_x


in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def _zero(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A zero that the compiler takes to depend on x, since XLA for GPUs drops barriers before it schedules.

    Elsewhere a plain zero, also with several devices, which would have to send the value around.
    """
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1
    if target() != "gpu" or not alone or not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros((), dtype)
    # If x is infinite, the least normal number, which changes no sum; never NaN, as rows and adapters share kernels.
    return jnp.where(_first(x) > jnp.finfo(x.dtype).max, jnp.finfo(jnp.float32).tiny, 0).astype(dtype)


@jax.custom_batching.custom_vmap
def _first(x: jax.Array) -> jax.Array:
    """x's first element."""
    return jax.lax.index_in_dim(x.reshape(-1), 0, keepdims=False)


@_first.def_vmap
def _first_of_all(axis_size: int, in_batched: list, x: jax.Array) -> tuple[jax.Array, bool]:
    """One element for the whole batch: stacked adapters wait together, and a kernel is dequantised once for all."""
    return _first(x), False
