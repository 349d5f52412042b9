"""Row-wise 8 bits against bitsandbytes itself, to the bit."""

import bitsandbytes.functional as bnb
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jlora import quant


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(64, 1), (100, 33), (1536, 48), (7, 5)])
def test_it_is_bitsandbytes(shape, dtype):
    values = np.random.default_rng(0).standard_t(5, shape).astype(np.float32) * 0.05
    array = jnp.asarray(values).astype(dtype)
    leaf = quant.quantize(array, "int8")
    weight = torch.from_numpy(np.asarray(array, np.float32).T.copy()).half()
    codes, scale, _ = bnb.int8_vectorwise_quant(weight)
    np.testing.assert_array_equal(leaf.codes, codes.numpy().T)
    np.testing.assert_array_equal(leaf.scale[0], scale.numpy())
    expected = bnb.int8_vectorwise_dequant(codes, scale).to(getattr(torch, dtype.__name__)).float().numpy().T
    np.testing.assert_array_equal(np.asarray(quant.dequantize(leaf), np.float32), expected)


def test_an_output_of_zeros_stays_zero():
    leaf = quant.quantize(jnp.zeros((6, 2)).at[:, 1].set(1.0), "int8")
    np.testing.assert_array_equal(quant.dequantize(leaf)[:, 0], 0)
    np.testing.assert_allclose(quant.dequantize(leaf)[:, 1], 1, rtol=1e-6)
