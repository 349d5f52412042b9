"""Rounding to a narrower type holds in whatever program it stands."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.quant.scales import rounded_to

VALUES = np.concatenate(
    [scale * np.random.default_rng(0).standard_normal(500) for scale in (1e-7, 1e-5, 1.0, 1e3)], dtype=np.float32
)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16, jnp.float32])
def test_values_are_rounded_as_numpy_rounds_them(stored, dtype):
    found = jax.jit(lambda x: rounded_to(x, stored, dtype))(VALUES)
    expected = VALUES.astype(stored).astype(dtype or stored)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16])
def test_no_narrowing_is_widened_at_once(stored):
    # XLA on a GPU leaves such a pair out: int8 was packed from values that float16 does not have.
    lines = jax.jit(lambda x: rounded_to(x, stored, jnp.float32)).lower(VALUES).as_text().splitlines()
    kinds = [line.split("stablehlo.")[1].split(" ")[0] for line in lines if "stablehlo." in line]
    assert ("convert", "convert") not in set(itertools.pairwise(kinds))
