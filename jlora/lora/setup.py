"""New adapters for a param tree, initialised as PEFT does."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.lora.config import LoraConfig
from jlora.lora.partition import is_adapter
from jlora.lora.targets import Target, find_targets
from jlora.types import Params


def init(params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """The same tree with adapters beside the targeted kernels; with the default initialisation the model computes the
    same.

    q_proj/kernel [L, D, N]  →  q_proj/kernel [L, D, N]          untouched, packed or not
                                q_proj/lora_a [L, D, R] float32  trainable
                                q_proj/lora_b [L, R, N] float32  trainable
                                q_proj/lora_scale [L]   float32  alpha / r; 0 switches the adapter off
                                q_proj/lora_rank [L]    int32    only where layers differ: columns beyond a layer's
                                rank are zero q_proj/lora_dropout [L] float32  only with dropout: the probability

    Each leaf's random key follows from its path alone, so adding a target never changes another target's start.

    Raises:
        ValueError: the tree has adapters already, or a pattern of the config matches nothing.
    """
    flat = tree.flatten(params)
    if present := [path for path in flat if is_adapter(path)]:
        raise ValueError(f"the params already hold adapters ({present[0]}, …): merge or strip them first")
    for target in find_targets(params, config):
        shape = flat[f"{target.path}/kernel"].shape
        for name, leaf in _adapter(target, shape, config, key).items():
            flat[f"{target.path}/{name}"] = leaf
    return tree.unflatten(flat)


def _adapter(target: Target, kernel_shape: tuple[int, ...], config: LoraConfig, key: jax.Array) -> dict[str, jax.Array]:
    *stack, inputs, outputs = kernel_shape
    rank = max(target.ranks)
    ranks = np.array(target.ranks).reshape(stack)
    lora_a, lora_b = _draw((*stack, inputs, rank), (*stack, rank, outputs), config, _path_key(key, target.path))
    if (ranks != rank).any():
        used = jnp.asarray(np.arange(rank) < ranks[..., None])
        lora_a, lora_b = lora_a * used[..., None, :], lora_b * used[..., :, None]
    adapter = {"lora_a": lora_a, "lora_b": lora_b, "lora_scale": _per_layer(target.scales, stack)}
    if (ranks != rank).any():
        adapter["lora_rank"] = jnp.asarray(ranks, jnp.int32)
    if config.lora_dropout:
        adapter["lora_dropout"] = jnp.full(stack, config.lora_dropout, jnp.float32)
    return adapter


def _per_layer(values: tuple[float, ...], stack: list[int]) -> jax.Array:
    return jnp.asarray(np.array(values, np.float32).reshape(stack))


def _path_key(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _draw(
    a_shape: tuple[int, ...], b_shape: tuple[int, ...], config: LoraConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A and B by PEFT's formulas: kaiming_uniform(a=sqrt(5)) is uniform in ±1/sqrt(fan in)."""
    inputs, rank = a_shape[-2:]
    key_a, key_b = jax.random.split(key)
    a_bound, b_bound = 1 / math.sqrt(inputs), 1 / math.sqrt(rank)
    lora_a = jax.random.uniform(key_a, a_shape, jnp.float32, -a_bound, a_bound)
    lora_b = jnp.zeros(b_shape, jnp.float32)
    match config.init_lora_weights:
        case "gaussian":
            lora_a = jax.random.normal(key_a, a_shape, jnp.float32) / rank
        case "zero_a":
            lora_a = jnp.zeros(a_shape, jnp.float32)
            lora_b = jax.random.uniform(key_b, b_shape, jnp.float32, -b_bound, b_bound)
        case False:
            lora_b = jax.random.uniform(key_b, b_shape, jnp.float32, -b_bound, b_bound)
    return lora_a, lora_b
