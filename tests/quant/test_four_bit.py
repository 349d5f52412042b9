"""NF4 and FP4 against bitsandbytes itself, to the bit; int4 against its formula."""

import dataclasses

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from jlora import quant, tree
from jlora.quant.four_bit import CODEBOOKS, block_scales, from_flat, to_flat
from jlora.quant.scales import dynamic_map

SHAPES = [(64, 1), (128, 96), (576, 192), (1536, 576), (100, 33), (96, 7), (48, 4)]


def kernel(shape, dtype=np.float32, seed=0):
    """A kernel [D, N] with outliers, a block of zeros and exact repeats of its largest value."""
    values = np.random.default_rng(seed).standard_t(5, shape).astype(np.float32) * 0.05
    values[: min(64, shape[0]), 0] = 0
    return jnp.asarray(values).astype(dtype)


def torch_transpose(array):
    values = torch.from_numpy(np.array(array.astype(jnp.float32)).T.copy())
    return values.to(torch.bfloat16) if array.dtype == jnp.bfloat16 else values


def bitsandbytes_values(packed, absmax, state):
    """What bitsandbytes dequantises, as a kernel. Its fast CPU kernel reads wrong scales when a block straddles
    rows.
    """
    if state.shape[1] % 64 == 0:
        return bnb.dequantize_4bit(packed, state).float().numpy().T
    values = _dequantize_4bit_compute(packed.ravel(), absmax, state.code, 64, state.shape, state.dtype)
    return values.float().numpy().T


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_single_quantisation_is_bitsandbytes(shape, dtype, format):
    array = kernel(shape, dtype)
    leaf = quant.quantize(array, format, double_quant=False)
    packed, state = bnb.quantize_4bit(torch_transpose(array), quant_type=format, compress_statistics=False)
    codes, absmax = to_flat(leaf)
    np.testing.assert_array_equal(codes, packed.numpy().ravel())
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    expected = bitsandbytes_values(packed, state.absmax, state)
    np.testing.assert_array_equal(np.asarray(quant.dequantize(leaf, jnp.float32)), expected)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantisation_is_bitsandbytes(shape, dtype, format):
    array = kernel(shape, dtype)
    leaf = quant.quantize(array, format, double_quant=True)
    packed, state = bnb.quantize_4bit(torch_transpose(array), quant_type=format, compress_statistics=True)
    np.testing.assert_allclose(leaf.offset, state.offset.numpy(), rtol=3e-7)
    np.testing.assert_array_equal(np.asarray(leaf.absmax).T.ravel(), state.absmax.numpy())
    # the offset is a sum whose order torch chooses; with torch's last bit everything that follows is equal to the bit
    leaf = dataclasses.replace(leaf, offset=jnp.asarray(state.offset.numpy()))
    np.testing.assert_allclose(leaf.nested_absmax, state.state2.absmax.numpy(), rtol=1e-6)
    leaf = dataclasses.replace(leaf, nested_absmax=jnp.asarray(state.state2.absmax.numpy()))
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    expected = bitsandbytes_values(packed, absmax, state)
    np.testing.assert_array_equal(np.asarray(quant.dequantize(leaf, jnp.float32)), expected)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_code_books_are_bitsandbytes(format):
    np.testing.assert_array_equal(CODEBOOKS[format], bnb.get_4bit_type(format, device="cpu").numpy())


def test_int4_is_the_integers_of_four_bits_in_each_block():
    array = np.asarray(kernel((128, 5)))
    blocks = array.reshape(2, 64, 5)
    absmax = np.abs(blocks).max(1, keepdims=True)
    code = np.clip(np.round(blocks / np.where(absmax == 0, 1, absmax) * 8), -8, 7)
    expected = (code / 8 * absmax).reshape(128, 5)
    found = quant.dequantize(quant.quantize(jnp.asarray(array), "int4", double_quant=False))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_a_tie_goes_to_the_lower_value(format):
    """Midpoints of a block whose largest magnitude is 1, and the next numbers on either side of them."""
    values = np.sort(CODEBOOKS[format])
    middles = (values[:-1] + values[1:]) / np.float32(2)
    for given, expected in (
        (middles, values[:-1]),
        (np.nextafter(middles, np.float32(2)), values[1:]),
        (np.nextafter(middles, np.float32(-2)), values[:-1]),
    ):
        block = np.full(64, -1, np.float32)
        block[: len(middles)] = given
        found = quant.dequantize(quant.quantize(jnp.asarray(block[:, None]), format))[: len(middles), 0]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_flat_parts_make_the_same_value_again(shape):
    leaf = quant.quantize(kernel(shape), "fp4")
    again = from_flat(
        *to_flat(leaf),
        np.asarray(leaf.nested_absmax),
        np.asarray(leaf.offset),
        format="fp4",
        matrix=leaf.matrix,
        dtype=leaf.dtype,
    )
    jax.tree.map(np.testing.assert_array_equal, again, leaf)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes(signed):
    np.testing.assert_array_equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed).numpy())


def test_a_stack_is_its_layers_one_by_one():
    stack = jnp.stack([kernel((128, 24), seed=i) * (i + 1) for i in range(3)])
    leaf = quant.quantize(stack)
    assert leaf.shape == stack.shape and leaf.ndim == 3 and leaf.size == stack.size
    for i in range(3):
        layer = quant.quantize(stack[i])
        np.testing.assert_array_equal(quant.dequantize(leaf)[i], quant.dequantize(layer))
        np.testing.assert_array_equal(leaf.nested_absmax[i], layer.nested_absmax)


def test_bits_a_parameter():
    leaf = quant.quantize(kernel((1536, 576)))
    assert 8 * tree.nbytes(leaf) / leaf.size == pytest.approx(4.127, abs=2e-3)
    single = quant.quantize(kernel((1536, 576)), double_quant=False)
    assert 8 * tree.nbytes(single) / single.size == 4.5


def test_scales_are_the_same_compiled_and_not():
    leaf = quant.quantize(kernel((576, 192)))
    with jax.disable_jit():
        plain = block_scales(leaf)
    np.testing.assert_array_equal(jax.jit(block_scales)(leaf), plain)


@pytest.mark.parametrize("shape", [(2, 128, 96), (2, 100, 33)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_recovering_the_scales_beforehand_changes_no_value(shape, dtype):
    leaf = quant.quantize(jnp.stack([kernel(shape[1:], dtype, seed) for seed in range(shape[0])]), "nf4")
    once = quant.with_scales({"kernel": leaf, "scale": jnp.ones(3)})
    assert once["kernel"].nested_absmax is None and once["kernel"].absmax.dtype == jnp.float32
    np.testing.assert_array_equal(quant.dequantize(once["kernel"]), quant.dequantize(leaf))


def test_scales_are_recovered_beforehand_on_a_cpu_only(monkeypatch):
    leaf = quant.quantize(kernel((128, 96)), "nf4")
    monkeypatch.setattr("jlora.quant.packed.target", lambda: "gpu")
    assert quant.with_scales({"kernel": leaf})["kernel"] is leaf
