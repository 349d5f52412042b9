"""Mixed precision: which layers' kernels to keep in more bits, by how much packing each of them hurts."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.quant.config import QuantConfig, leaf_format
from jlora.quant.formats import dequantize, quantize
from jlora.quant.four_bit import BLOCK
from jlora.quant.scales import NESTED_BLOCK
from jlora.types import Params


class Candidate(NamedTuple):
    """One layer's kernel that a QuantConfig packs.

    Attributes:
        name: "layers/3/mlp/down_proj/kernel", a path that rules may name.
        path, index: the leaf that holds it, and where on its first axis.
        format: that the config gives it.
        size: its weights.
    """

    name: str
    path: str
    index: int
    format: str
    size: int


def candidates(params: Params, config: QuantConfig) -> list[Candidate]:
    """The kernels of stacked layers that `config` packs."""
    found = []
    for path, leaf in tree.flatten(params).items():
        stack = tree.stack_of(path)
        for index, layer in enumerate(stack.indices(leaf.shape[0]) if stack else []):
            if format := leaf_format(path, config, layer):
                found.append(
                    Candidate(f"{stack.name}/{layer}/{stack.rest}", path, index, format, leaf.size // leaf.shape[0])
                )
    return found


def weight_damage(params: Params, config: QuantConfig) -> dict[str, float]:
    """Candidate's name → squared error of its packed weights: what can be known without data."""
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
    """`config` with rules before its own that keep the kernels of most damage a weight in the format `spare`.

    Kernels are taken in that order while the mean over all candidates stays within `bits` a weight; one that is too
    large for what is left is passed over.

    Args:
        spare: "int8", or None for 16 bits.

    Raises:
        ValueError: `bits` is less than what `config` takes, or as many as `spare` takes.
    """
    total = sum(candidate.size for candidate in found)
    used = sum(bits_of(candidate.format, config.double_quant) * candidate.size for candidate in found)
    most = bits_of(spare)
    if not found or not used <= bits * total < most * total:
        least = used / total if found else 0.0
        raise ValueError(f"bits={bits}: found no such mixture, expected from {least:.3f} to less than {most:g}")
    kept = []
    for candidate in sorted(found, key=lambda candidate: -damage[candidate.name] / candidate.size):
        extra = (most - bits_of(candidate.format, config.double_quant)) * candidate.size
        if used + extra <= bits * total:
            used += extra
            kept.append(candidate.name)
    rules = tuple((re.escape(name), spare) for name in sorted(kept))
    return QuantConfig(rules=(*rules, *config.rules), double_quant=config.double_quant)


def bits_of(format: str | None, double_quant: bool = True) -> float:
    """Bits a weight of a large kernel, scales included (but int8's, which are one for an output)."""
    if format is None or format == "int8":
        return 16.0 if format is None else 8.0
    return 4 + (8 + 32 / NESTED_BLOCK if double_quant else 32) / BLOCK


@functools.partial(jax.jit, static_argnames=("format", "double_quant"))
def _squared_error(kernel: jax.Array, format: str, double_quant: bool) -> jax.Array:
    packed = dequantize(quantize(kernel, format, double_quant=double_quant))
    return jnp.sum((kernel.astype(jnp.float32) - packed.astype(jnp.float32)) ** 2)
