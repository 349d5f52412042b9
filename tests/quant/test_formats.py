"""What holds for every packed format: error, size, stacks, products and what their gradients keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import quant, tree

# Format → relative root mean square error on normal weights, and bits a weight (of a kernel of 1024 × 256).
PINNED = {
    "nf4": (0.0922, 4.127),
    "fp4": (0.1220, 4.127),
    "int4": (0.0994, 4.127),
    "int8": (0.0079, 8.031),
    "mxfp4": (0.1151, 4.25),
}


def kernel(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_table_is_complete():
    assert set(PINNED) == set(quant.FORMATS)


@pytest.mark.parametrize("format", PINNED)
def test_error_and_size(format):
    array = kernel(1024, 256)
    leaf = quant.quantize(array, format)
    error = jnp.linalg.norm(quant.dequantize(leaf) - array) / jnp.linalg.norm(array)
    assert (float(error), 8 * tree.nbytes(leaf) / leaf.size) == pytest.approx(PINNED[format], rel=5e-3)


@pytest.mark.parametrize("format", PINNED)
@pytest.mark.parametrize("inputs", [128, 100])
def test_a_stack_is_its_layers_one_by_one(format, inputs):
    stack = kernel(3, 2, inputs, 33)
    leaf = quant.quantize(stack, format)
    assert (leaf.shape, leaf.ndim, leaf.size) == (stack.shape, 4, stack.size)
    layers = jax.lax.scan(lambda carry, layer: (carry, quant.dequantize(layer)), None, leaf)[1]
    for index in np.ndindex(3, 2):
        alone = quant.dequantize(quant.quantize(stack[index], format))
        np.testing.assert_array_equal(layers[index], alone)
        np.testing.assert_array_equal(quant.dequantize(leaf)[index], alone)


@pytest.mark.parametrize("format", PINNED)
@pytest.mark.parametrize(("device", "inputs"), [("cpu", 128), ("cpu", 100), ("tpu", 128), ("tpu", 100)])
def test_products_and_gradients_are_those_of_the_dense_kernel(monkeypatch, format, device, inputs):
    monkeypatch.setattr("jlora.quant.packed.target", lambda: device)
    x, leaf = kernel(2, 5, inputs, seed=1), quant.quantize(kernel(inputs, 24), format)
    dense = quant.dequantize(leaf)
    value, pull = jax.vjp(lambda x: quant.matmul(x, leaf), x)
    np.testing.assert_allclose(value, x @ dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull(value)[0], value @ dense.T, rtol=1e-5, atol=1e-4)
    shapes = {residual.shape for residual in jax.tree.leaves(pull)}
    kept = sum(part.nbytes for part in jax.tree.leaves(pull))
    assert (inputs, 24) not in shapes or format == "int8"
    assert kept <= 1.2 * tree.nbytes(leaf)


@pytest.mark.parametrize("format", PINNED)
@pytest.mark.parametrize(("device", "inputs"), [("cpu", 70), ("tpu", 70), ("tpu", 128)])
def test_grouped_products(monkeypatch, format, device, inputs):
    monkeypatch.setattr("jlora.quant.packed.target", lambda: device)
    x, stack, sizes = kernel(7, inputs, seed=1), kernel(3, inputs, 9), jnp.array([2, 0, 5])
    leaf = quant.quantize(stack, format)
    dense = quant.dequantize(leaf)
    expected = jnp.concatenate([x[:2] @ dense[0], x[2:] @ dense[2]])
    value, pull = jax.vjp(lambda x: quant.grouped_matmul(x, leaf, sizes), x)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    grads = jnp.concatenate([value[:2] @ dense[0].T, value[2:] @ dense[2].T])
    np.testing.assert_allclose(pull(value)[0], grads, rtol=1e-5, atol=1e-4)


def test_rules_mix_formats_by_path():
    rules = ((r"layers/0/.*/kernel", "int8"), (r".*/down_proj/kernel", "fp4"), (r".*", None))
    config = quant.QuantConfig(rules=rules)
    paths = ("layers/mlp/down_proj/kernel", "layers/mlp/up_proj/kernel")
    assert [[quant.leaf_format(path, config, layer) for layer in (0, 1)] for path in paths] == [
        ["int8", "fp4"],
        ["int8", None],
    ]
    for format in quant.FORMATS:
        assert quant.leaf_format(paths[0], quant.as_config(format)) == format


def test_errors_name_what_was_found():
    with pytest.raises(ValueError, match="'int3' is unknown; expected one of nf4, fp4, int4, int8, mxfp4"):
        quant.quantize(kernel(64, 4), "int3")
    with pytest.raises(ValueError, match=r"found shape \(64,\)"):
        quant.quantize(jnp.zeros(64))
