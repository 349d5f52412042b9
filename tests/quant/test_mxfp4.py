"""MXFP4 against transformers' conversion of gpt-oss's tensors and ml_dtypes' rounding, to the bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jlora import quant
from jlora.quant.mxfp4 import BLOCK, LARGEST, VALUES, PackedMxfp4


def shipped(experts=3, inputs=96, outputs=7, lowest=1, highest=LARGEST, seed=0):
    """gpt-oss's (blocks [E, out, in/32, 16], scales [E, out, in/32]), with every code and many scales."""
    random = np.random.default_rng(seed)
    shape = (experts, outputs, inputs // BLOCK)
    return random.integers(0, 256, (*shape, 16), np.uint8), random.integers(lowest, highest + 1, shape, np.uint8)


def leaf_of(blocks, scales, dtype=jnp.float32):
    codes = blocks.reshape(*blocks.shape[:-2], -1)
    codes, scales = (jnp.asarray(part.swapaxes(-1, -2)) for part in (codes, scales))
    return PackedMxfp4(codes, scales, (2 * codes.shape[-2], codes.shape[-1]), jnp.dtype(dtype))


@pytest.mark.parametrize(("dtype", "theirs"), [(jnp.float32, torch.float32), (jnp.bfloat16, torch.bfloat16)])
def test_values_are_transformers(dtype, theirs):
    """Every code with every scale whose values are normal numbers, signs of zeros included."""
    scales = np.arange(3, LARGEST + 1, dtype=np.uint8).reshape(1, -1, 1)
    codes = np.arange(16, dtype=np.uint8) * 16 + np.arange(15, -1, -1, dtype=np.uint8)
    every = np.broadcast_to(codes, (*scales.shape, 16)).copy(), scales
    for tensors in (every, shipped(lowest=3)):
        expected = convert_moe_packed_tensors(*map(torch.tensor, tensors), dtype=theirs).float().numpy()
        found = np.asarray(quant.dequantize(leaf_of(*tensors, dtype)).astype(jnp.float32))
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_the_smallest_scales_lose_at_most_what_the_device_flushes():
    blocks, scales = shipped(lowest=0, highest=2)
    scales[0, 0] = 0
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32).numpy()
    found = np.asarray(quant.dequantize(leaf_of(blocks, scales)))
    normal = (np.abs(expected) >= np.finfo(np.float32).tiny) & np.repeat(scales > 0, BLOCK, axis=-1).swapaxes(1, 2)
    np.testing.assert_array_equal(found[normal], expected[normal])
    assert np.all((found == expected) | (found == 0) | normal)


def test_rounding_is_to_the_nearest_value_ties_to_even():
    """On every quarter and every value between, below the largest; beyond it, values become the largest."""
    values = np.concatenate([np.arange(0, 8, 1 / 64), [7.999]]).astype(np.float32)
    values = np.concatenate([values, -values])
    column = np.concatenate([[4.0], np.zeros(31)]).astype(np.float32)  # a scale of 1
    array = np.tile(column[:, None], (1, len(values)))
    array[1] = values
    found = np.asarray(quant.dequantize(quant.quantize(jnp.asarray(array), "mxfp4")))
    nearest = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(found[1], nearest)
    np.testing.assert_array_equal(np.signbit(found[1]), np.signbit(values))
    np.testing.assert_array_equal(found[0], 4)


def test_scales_are_the_largest_magnitudes_power_of_two():
    largest = np.array([1, 1.999, 2, 3.9, 4, 7.99, 8, 2.0**-20, 3e38, 0, 2.0**-126], np.float32)
    array = np.zeros((64, len(largest)), np.float32)
    array[40] = -largest
    leaf = quant.quantize(jnp.asarray(array), "mxfp4")
    with np.errstate(divide="ignore"):
        expected = np.maximum(np.floor(np.log2(largest)) - 2 + 127, 0)
    np.testing.assert_array_equal(leaf.scales[1], expected)
    np.testing.assert_array_equal(leaf.scales[0], 0)
    assert np.all(np.isfinite(quant.dequantize(leaf)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packing_again_keeps_every_value(dtype):
    """Whatever rule chose the scales: those of gpt-oss are not all the specification's."""
    leaf = leaf_of(*shipped(lowest=10), dtype)
    again = quant.quantize(quant.dequantize(leaf), "mxfp4")
    np.testing.assert_array_equal(quant.dequantize(again), quant.dequantize(leaf))
    assert (again.matrix, again.dtype) == (leaf.matrix, leaf.dtype)


def test_error_on_normal_weights_is_as_the_format_allows():
    """Half the distance between neighbours at most, below the largest value."""
    array = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    leaf = quant.quantize(jnp.asarray(array), "mxfp4")
    scales = np.repeat(np.exp2(np.asarray(leaf.scales, np.float32) - 127), BLOCK, axis=0)
    scaled, found = array / scales, np.asarray(quant.dequantize(leaf)) / scales
    inside = np.abs(scaled) <= 6
    distances = np.abs(scaled[..., None] - VALUES).min(axis=-1)
    np.testing.assert_allclose(np.abs(scaled - found)[inside], distances[inside], atol=1e-6)
    np.testing.assert_array_equal(np.abs(found[~inside]), 6)


def test_inputs_that_are_no_multiple_of_a_block_are_padded():
    array = jnp.asarray(np.random.default_rng(0).normal(size=(2, 70, 5)), jnp.float32)
    leaf = quant.quantize(array, "mxfp4")
    assert (leaf.codes.shape, leaf.scales.shape, leaf.shape) == ((2, 48, 5), (2, 3, 5), (2, 70, 5))
    whole = quant.quantize(jnp.pad(array, [(0, 0), (0, 26), (0, 0)]), "mxfp4")
    np.testing.assert_array_equal(quant.dequantize(leaf), quant.dequantize(whole)[:, :70])


def test_a_packed_stack_is_dequantised_inside_a_compiled_loop():
    leaf = leaf_of(*shipped(lowest=120, highest=130))

    def step(x, kernel):
        return x, quant.matmul(x, kernel)

    x = jnp.ones((4, 96))
    _, found = jax.jit(lambda x, leaf: jax.lax.scan(step, x, leaf))(x, leaf)
    np.testing.assert_allclose(found, jnp.einsum("md,edn->emn", x, quant.dequantize(leaf)), rtol=1e-5)
