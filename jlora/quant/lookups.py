"""The values of a small table at many indices: one signature, and a table of the forms that compute it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Shaped

from jlora.kernels.device import target

# Device → forms for tables of up to FEW values, and of more. XLA vectorises selects on a CPU, but not a gather.
# Elsewhere it moves the selects' constants out of the loop over layers and keeps them as arrays of the index's size
# until the end: 5 GiB of Llama-3.1-8B's step. A TPU gathers values one by one, but selects among them by whole vectors.
BEST = {"cpu": ("select", "gather"), "gpu": ("gather", "gather"), "tpu": ("bits", "bits")}
FEW = 16


def lookup(index: Integer[Array, "*shape"], table: Shaped[np.ndarray, "values"]) -> Shaped[Array, "*shape"]:
    """table[index] in the form that is fastest on the device that is compiled for.

    Args:
        index: numbers from 0 to `values` - 1; others give anything.
        table: values of up to 32 bits.
    """
    return FORMS[BEST[target()][len(table) > FEW]](index, table)


def _select(index: jax.Array, table: np.ndarray) -> jax.Array:
    """By a tree of selects."""

    def choose(bit: int, values: np.ndarray) -> jax.Array:
        if len(values) == 1:
            return jnp.asarray(values[0])
        low, high = (choose(bit - 1, half) for half in np.split(values, 2))
        return jnp.where((index >> bit) & 1 == 1, high, low)

    table = _filled(table)
    return choose(len(table).bit_length() - 2, table)


def _bits(index: jax.Array, table: np.ndarray) -> jax.Array:
    """By a tree of selects, without constants for the compiler to materialise.

    Its leaves compute one of two values' bits from the last index bit.
    """
    index = index.astype(jnp.int32)
    last = -(index & 1)

    def choose(bit: int, values: np.ndarray) -> jax.Array:
        if bit == 0:
            low, high = (int(value) for value in values.view(np.int32))
            return low ^ (last & (low ^ high))
        low, high = (choose(bit - 1, half) for half in np.split(values, 2))
        return jnp.where((index >> bit) & 1 == 1, high, low)

    values = _filled(table).astype(np.float32)
    found = jax.lax.bitcast_convert_type(choose(len(values).bit_length() - 2, values), jnp.float32)
    return found.astype(table.dtype)


def _gather(index: jax.Array, table: np.ndarray) -> jax.Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")


def _filled(table: np.ndarray) -> np.ndarray:
    """The table, continued with its last value to a power of two."""
    return np.pad(table, (0, (1 << (len(table) - 1).bit_length()) - len(table)), mode="edge")


FORMS = {"select": _select, "gather": _gather, "bits": _bits}
