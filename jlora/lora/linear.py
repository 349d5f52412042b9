"""The one place where a base product, its packing and its adapter meet."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora import quant
from jlora.types import Params


def linear(x: Float[Array, "*batch D"], module: Params, *, key: jax.Array | None = None) -> Float[Array, "*batch N"]:
    """x @ kernel + bias + scale · (dropout(x) @ lora_a) @ lora_b, with whichever of these leaves `module` holds.

    The update is computed in the adapter's dtype (float32) and the sum rounded once to x's dtype, as PEFT does (LoRA, Hu et al.
    2021).

    Args:
        key: turns on `lora_dropout`; without it nothing is dropped.
    """
    y = quant.matmul(x, module["kernel"])
    if "bias" in module:
        y = y + module["bias"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    if "lora_a" not in module:
        return y
    return (y + update(x, module, key=key).astype(jnp.float32)).astype(y.dtype)


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
