"""Optimizers that see a weight as a matrix. Stacks of layers and experts hold many, and each is treated by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.families import called
from jlora.lora.kinds import own_axes
from jlora.types import Params

# Of the quintic polynomial in "Muon: An optimizer for hidden layers in neural networks" (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# The size of AdamW's steps, as a root mean square, that those of matrices are given ("Muon is Scalable for LLM
# Training", Liu et al. 2025).
RMS = 0.2
MATRIX, OTHER = "matrix", "other"


def scale_by_muon(momentum: float, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Steps of matrices with all singular values near one size, and Adam's for everything else.

    Embeddings, heads, and what adapts them are no such matrices: their rows belong to tokens.
    """
    rules = {
        MATRIX: optax.chain(optax.trace(decay=momentum, nesterov=True), optax.stateless_with_tree_map(_orthogonal)),
        OTHER: optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    }
    return optax.partition(rules, lambda params: jax.tree_util.tree_map_with_path(_label, params))


def scale_by_adafactor(eps: float, beta2_decay: float, clip_threshold: float) -> optax.GradientTransformation:
    """Steps scaled by second moments that are held as the means of a matrix's rows and columns.

    These are the steps of transformers' Adafactor without `relative_step` and `scale_parameter`.
    """
    return each_alone(
        optax.chain(
            optax.scale_by_factored_rms(decay_rate=-beta2_decay, min_dim_size_to_factor=1, epsilon=eps),
            optax.clip_by_block_rms(clip_threshold),
        )
    )


def each_alone(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation applied to the weight of every single layer and expert as if there were no other."""

    def over_stack(function: Callable, path: tuple, leaf: jax.Array) -> Callable:
        for _ in range(leaf.ndim - own_axes(path[-1].key)):
            function = jax.vmap(function)
        return function

    def init(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: over_stack(inner.init, path, leaf)(leaf), params)

    def update(grads: Params, state: Params, params: Params) -> tuple[Params, Params]:
        leaves, structure = jax.tree_util.tree_flatten_with_path(grads)
        states, weights = map(structure.flatten_up_to, (state, params))
        found = [
            over_stack(inner.update, path, grad)(grad, own, weight)
            for (path, grad), own, weight in zip(leaves, states, weights, strict=True)
        ]
        return structure.unflatten([step for step, _ in found]), structure.unflatten([after for _, after in found])

    return optax.GradientTransformation(init, update)


def _label(path: tuple, leaf: jax.Array) -> str:
    keys = [key.key for key in path]
    rows = set(keys) & {*called("head", "embedding", "positions"), "score"}
    return MATRIX if own_axes(keys[-1]) == 2 and leaf.ndim >= 2 and not rows else OTHER


def _orthogonal(update: jax.Array, _: Any) -> jax.Array:
    """The nearest matrix with equal singular values, roughly, by Newton-Schulz iterations."""
    x = update.astype(jnp.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        squared = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * squared + c * squared @ squared) @ x
    x = jnp.swapaxes(x, -1, -2) if tall else x
    return RMS * max(x.shape[-2:]) ** 0.5 * x
