"""Mixed precision: choosing the layers' kernels to keep in more bits, by how much packing each of them hurts."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.errors import UserError
from jlora.quant.config import QuantConfig, leaf_format
from jlora.quant.formats import quantize
from jlora.quant.packed import dequantize
from jlora.types import Params


class Candidate(NamedTuple):
    """One layer's kernel that a QuantConfig packs.

    Attributes:
        name: the path that rules may name, such as "layers/3/mlp/down_proj/kernel".
        path, index: the leaf that holds it, and its index on the leaf's first axis.
        format: the format that the config gives it.
        matrix: (D, N); a kernel of experts has several such matrices.
        size: its number of weights.
    """

    name: str
    path: str
    index: int
    format: str
    matrix: tuple[int, int]
    size: int


def candidates(params: Params, config: QuantConfig) -> list[Candidate]:
    """The kernels of stacked layers that `config` packs."""
    found = []
    flat = tree.flatten(params)
    stack_of = tree.stacks_of(flat)
    for path, leaf in flat.items():
        stack = stack_of(path)
        for index, layer in enumerate(stack.indices(leaf.shape[0]) if stack else []):
            if format := leaf_format(path, config, layer):
                name, matrix = f"{stack.name}/{layer}/{stack.rest}", (leaf.shape[-2], leaf.shape[-1])
                found.append(Candidate(name, path, index, format, matrix, leaf.size // leaf.shape[0]))
    return found


def weight_damage(params: Params, config: QuantConfig) -> dict[str, float]:
    """Candidate's name → squared error of its packed weights: an estimate of the damage that needs no data."""
    flat = tree.flatten(params)
    return {
        found.name: float(_squared_error(flat[found.path][found.index], found.format, config.double_quant))
        for found in candidates(params, config)
    }


def choose(
    found: Sequence[Candidate],
    damage: Mapping[str, float],
    bits: float,
    config: QuantConfig,
    *,
    spare: str | None = None,
) -> QuantConfig:
    """`config` with new first rules that keep the kernels with the most damage per weight in the format `spare`.

    Kernels are taken in descending order of damage while the mean over all candidates stays within `bits` a weight; a
    kernel too large for what is left is skipped.

    Args:
        found: what `candidates` returns.
        damage: candidate's name → damage, as from `weight_damage`.
        bits: mean bits a weight over all candidates.
        spare: "int8", or None for 16 bits.

    Raises:
        ValueError: `bits` is fewer than `config` takes, or no fewer than `spare` takes for every kernel.
    """
    total = sum(candidate.size for candidate in found)
    used = sum(bits_of(candidate, candidate.format, config) for candidate in found)
    most = sum(bits_of(candidate, spare, config) for candidate in found)
    if not found or not used <= bits * total < most:
        least, most = (float(count) / max(total, 1) for count in (used, most))
        raise UserError(f"bits={bits}: found no such mixture, expected from {least:.3f} to less than {most:.4g}")
    kept = []
    for candidate in sorted(found, key=lambda candidate: -damage[candidate.name] / candidate.size):
        extra = bits_of(candidate, spare, config) - bits_of(candidate, candidate.format, config)
        if used + extra <= bits * total:
            used += extra
            kept.append(candidate.name)
    rules = tuple((re.escape(name), spare) for name in sorted(kept))
    return dataclasses.replace(config, rules=(*rules, *config.rules))


def bits_of(candidate: Candidate, format: str | None, config: QuantConfig) -> int:
    """Bits that the kernel takes in `format`, scales included; with None 16 a weight."""
    if format is None:
        return 16 * candidate.size
    one = jax.eval_shape(
        functools.partial(quantize, format=format, double_quant=config.double_quant),
        jax.ShapeDtypeStruct(candidate.matrix, jnp.float32),
    )
    return 8 * tree.nbytes(one) * (candidate.size // math.prod(candidate.matrix))


@functools.partial(jax.jit, static_argnames=("format", "double_quant"))
def _squared_error(kernel: jax.Array, format: str, double_quant: bool) -> jax.Array:
    packed = dequantize(quantize(kernel, format, double_quant=double_quant))
    return jnp.sum((kernel.astype(jnp.float32) - packed.astype(jnp.float32)) ** 2)
