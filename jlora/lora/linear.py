"""The one place where a base product, its packing and its adapter meet."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jlora import quant
from jlora.types import Params

Kernel = jax.Array | quant.PackedArray
# The checkpoint_name of values that are dear to compute again: outputs of products and of attention.
SAVED = "saved"


def linear(x: Float[Array, "*batch D"], module: Params, *, key: jax.Array | None = None) -> Float[Array, "*batch N"]:
    """x @ kernel + bias + scale · (dropout(x) @ lora_a) @ lora_b, with whichever of these leaves `module` holds.

    The update is computed in the adapter's dtype (float32) and the sum rounded once to x's dtype, as PEFT does (LoRA,
    Hu et al. 2021).

    Args:
        key: turns on `lora_dropout`; without it nothing is dropped.
    """
    if _merging_pays(x, module, key):
        y = merged(x, module)
    else:
        y = quant.matmul(x, module["kernel"])
        if "lora_a" in module:
            y = (y + update(x, module, key=key).astype(jnp.float32)).astype(y.dtype)
    if "bias" in module:
        y = y + module["bias"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return checkpoint_name(y, SAVED)


def grouped_linear(x: Float[Array, "rows D"], sizes: Int[Array, "E"], module: Params) -> Float[Array, "rows N"]:
    """`linear` with a kernel for each of E groups of rows: the first sizes[0] rows take kernel[0], and so on.

    Every leaf has a leading axis of groups, but for lora_scale, which is one.
    """
    y = quant.grouped_matmul(x, module["kernel"], sizes)
    if "lora_a" in module:
        lora_a, lora_b = module["lora_a"], module["lora_b"]
        hidden = quant.grouped_matmul(x.astype(lora_a.dtype), lora_a, sizes) * module["lora_scale"]
        y = (y + quant.grouped_matmul(hidden, lora_b, sizes).astype(jnp.float32)).astype(y.dtype)
    return checkpoint_name(y, SAVED)


def update(x: Float[Array, "*batch D"], module: Params, *, key: jax.Array | None = None) -> Float[Array, "*batch N"]:
    """What the adapter adds: scale · (dropout(x) @ lora_a) @ lora_b."""
    lora_a, lora_b = module["lora_a"], module["lora_b"]
    inputs = x.astype(lora_a.dtype)
    if key is not None and "lora_dropout" in module:
        rate = module["lora_dropout"]
        keep = jax.random.bernoulli(key, 1 - rate, inputs.shape)
        inputs = jnp.where(keep, inputs / (1 - rate), 0)
    hidden = quant.matmul(inputs, lora_a) * module["lora_scale"]
    return quant.matmul(hidden, lora_b)


def merged(x: Float[Array, "*batch D"], module: Params) -> Float[Array, "*batch N"]:
    """x @ (kernel + scale · lora_a @ lora_b): one wide product, whose sum the backward pass forms again."""
    rows = x.reshape(-1, x.shape[-1])
    y = _merged(rows, module["kernel"], module["lora_a"], module["lora_b"], module["lora_scale"])
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _merging_pays(x: jax.Array, module: Params, key: jax.Array | None) -> bool:
    """Whether adding the update to the kernel costs less than adding it to the outputs (and backwards, the inputs).

    On CPUs only: elsewhere a float32 product may round its operands to fewer bits, and a small update would be lost in
    the sum.
    """
    if "lora_a" not in module or (key is not None and "lora_dropout" in module):
        return False
    inputs, outputs = module["kernel"].shape
    exact = jax.default_backend() == "cpu" and x.dtype == module["lora_a"].dtype == jnp.float32
    return exact and (x.size // inputs) * (inputs + outputs) > inputs * outputs


@jax.custom_vjp
def _merged(x: jax.Array, kernel: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    return x @ _sum(kernel, lora_a, lora_b, scale)


def _merged_forward(*inputs: Kernel) -> tuple[jax.Array, tuple]:
    return _merged(*inputs), inputs


def _merged_backward(inputs: tuple, grad: jax.Array) -> tuple:
    x, kernel, lora_a, lora_b, scale = inputs
    hidden, grad_hidden = x @ lora_a, grad @ lora_b.T
    # XLA's CPU backend is slow where the wide operand would be transposed: it is the right one here, and the barriers
    # keep XLA from folding the narrow transposes into the products.
    hold = jax.lax.optimization_barrier
    grad_a = hold(hold(grad_hidden * scale).T @ x).T
    grad_b = hold(hidden * scale).T @ grad
    grad_kernel = None if quant.is_packed(kernel) else (x.T @ grad).astype(kernel.dtype)
    return grad @ _sum(kernel, lora_a, lora_b, scale).T, grad_kernel, grad_a, grad_b, jnp.sum(hidden * grad_hidden)


_merged.defvjp(_merged_forward, _merged_backward)


def _sum(kernel: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: jax.Array) -> jax.Array:
    dense = quant.dequantize(kernel) if quant.is_packed(kernel) else kernel
    return dense.astype(jnp.float32) + (lora_a * scale) @ lora_b
