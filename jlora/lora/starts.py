"""Starts of A and B that are more than drawn numbers, by PEFT's formulas (`peft/tuners/lora/layer.py`).

PiSSA and OLoRA take a part out of the base and put it into the adapter. Here the base stays as it is: the part is kept
as `lora_start_a`, `lora_start_b` and subtracted from the update, which is the same sum and lets one base serve many
adapters.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from jlora import quant
from jlora.lora.config import FROM_WEIGHTS


def is_drawn(start: bool | str) -> bool:
    """Whether the start does not look at the base."""
    return not (isinstance(start, str) and re.fullmatch(FROM_WEIGHTS, start))


def shifts_base(start: bool | str) -> bool:
    """Whether the base is read without the start's product."""
    return isinstance(start, str) and start.startswith(("pissa", "olora"))


def orthogonal(a_shape: tuple[int, ...], b_shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random A and B whose product is zero: their rows come from two halves of one orthogonal matrix."""
    *stack, inputs, rank = a_shape
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (*stack, rank, rank)))
    lora_a = jax.random.normal(keys[1], (*stack, inputs, rank // 2)) @ q[..., 0::2, :] / 10
    wide = jax.random.normal(keys[2], (*stack, b_shape[-1], rank // 2)) @ q[..., 1::2, :] / 10
    return lora_a, jnp.swapaxes(wide, -1, -2)


def from_weights(
    start: str, kernel: Any, original: Any, rank: int, scale: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A [*stack, D, R] and B [*stack, R, N] from a kernel [*stack, D, N], one layer after another.

    Args:
        original: the kernel before it was packed; only "loftq" needs it.
    """
    if start == "loftq" and (original is None or not quant.is_packed(kernel)):
        raise ValueError(
            "init_lora_weights='loftq' starts from what packing lost: it needs packed params, and the same params "
            "unpacked as init(…, dense=…)"
        )
    layers = kernel.shape[:-2]
    if not layers:
        return _one(start, kernel, original, rank, scale, key)
    pairs = [
        _one(start, _layer(kernel, i), _layer(original, i), rank, scale[i], jax.random.fold_in(key, i))
        for i in range(layers[0])
    ]
    return tuple(jnp.stack(parts) for parts in zip(*pairs, strict=True))


def _layer(value: Any, index: int) -> Any:
    return None if value is None else jax.tree.map(lambda part: part[index], value)


def _one(start: str, kernel: Any, original: Any, rank: int, scale: jax.Array, key: jax.Array) -> tuple:
    dense = (quant.dequantize(kernel) if quant.is_packed(kernel) else kernel).astype(jnp.float32)
    if rank > min(dense.shape):
        raise ValueError(f"init_lora_weights={start!r}: rank {rank} is more than a kernel {dense.shape} has")
    if start == "loftq":  # PEFT does not divide by the scale here
        return _leading(original.astype(jnp.float32) - dense, rank, 1.0)
    if start == "olora":
        q, r = jnp.linalg.qr(dense.T)
        return r[:rank].T, q[:, :rank].T
    if start == "pissa":
        return _leading(dense, rank, scale)
    return _leading_by_iteration(dense, rank, scale, int(start.rpartition("_")[2]), key)


def _leading(matrix: jax.Array, rank: int, scale: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """The leading singular triples, their values (over the scale) shared equally."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    return left[:, :rank] * root[None, :], root[:, None] * right[:rank]


def _leading_by_iteration(
    matrix: jax.Array, rank: int, scale: jax.Array, iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_leading`, nearly, by subspace iteration (Halko et al. 2011): quick for large kernels."""
    basis, _ = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], rank)))
    for _ in range(iterations):
        basis, _ = jnp.linalg.qr(matrix @ jnp.linalg.qr(matrix.T @ basis)[0])
    lora_a, lora_b = _leading(basis.T @ matrix, rank, scale)
    return basis @ lora_a, lora_b
