"""What every packed value does as the array that it stands for would: slicing, splitting, being added to and kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import quant, sharding

STACK = jnp.asarray(np.random.default_rng(0).normal(size=(3, 512, 32)), jnp.bfloat16)
# Name → what packs a stack: each format, at once and when used.
KINDS = {
    **{format: lambda array, format=format: quant.quantize(array, format) for format in quant.FORMATS},
    **{
        f"{format}, when used": lambda array, format=format: quant.Rounded(array, format, True)
        for format in quant.FORMATS
    },
}

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_it_says_what_it_stands_for(kind):
    leaf = KINDS[kind](STACK)
    assert quant.is_packed(leaf) and leaf.format == kind.split(",")[0]
    assert (leaf.shape, leaf.ndim, leaf.size, leaf.dtype) == (STACK.shape, 3, STACK.size, jnp.bfloat16)
    assert quant.dequantize(leaf).dtype == jnp.bfloat16
    np.testing.assert_array_equal(quant.dequantize(leaf, jnp.float32), quant.dequantize(leaf).astype(jnp.float32))


@every_kind
@pytest.mark.parametrize("inputs", [512, 100])  # 100: a 4-bit kernel in one column
def test_a_layer_of_it_is_the_layer_of_the_array(kind, inputs):
    leaf = KINDS[kind](STACK[:, :inputs])
    for index in (0, 2, slice(1, 3), jnp.int32(1), ()):
        np.testing.assert_array_equal(quant.dequantize(leaf[index]), quant.dequantize(leaf)[index])
    assert leaf[1].shape == (inputs, 32)
    with pytest.raises(TypeError, match="not iterable"):
        list(leaf)


@every_kind
@pytest.mark.parametrize("device", ["cpu", "tpu"])
@pytest.mark.parametrize("inputs", [512, 96, 100, 33])
def test_its_parts_are_every_so_many_rows(monkeypatch, kind, device, inputs):
    monkeypatch.setattr("jlora.quant.packed.target", lambda: device)
    leaf = KINDS[kind](STACK[:, :inputs])
    parts = leaf.strided(jnp.float32)
    for first, part in enumerate(parts):
        np.testing.assert_array_equal(part, quant.dequantize(leaf, jnp.float32)[:, first :: len(parts)])
    whole = {"nf4": 64, "fp4": 64, "int4": 64, "mxfp4": 2}  # inputs of which there must be a multiple
    split = device == "tpu" and kind in whole and inputs % whole[kind] == 0
    assert len(parts) == (2 if split else 1)


@every_kind
def test_it_is_split_as_the_array_and_stands_for_the_same(kind):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    leaf, path = KINDS[kind](STACK), "layers/mlp/up_proj/kernel"
    placed = sharding.leaf_sharding(path, leaf, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(leaf)
    split = jax.device_put(leaf, placed)
    largest = max(jax.tree.leaves(split), key=lambda part: part.size)
    assert largest.sharding.spec == sharding.leaf_sharding(path, STACK, mesh).spec
    np.testing.assert_array_equal(jax.jit(quant.dequantize)(split), quant.dequantize(leaf))


@every_kind
def test_what_an_update_is_added_to_and_what_a_merge_keeps(kind):
    leaf = KINDS[kind](STACK)
    kept = quant.stored(leaf, jnp.float32)
    np.testing.assert_array_equal(quant.dequantize(kept), quant.dequantize(leaf))
    assert not quant.packs_update(kept)
    if quant.packs_update(leaf):
        np.testing.assert_array_equal(quant.unpacked(leaf), STACK)
        packed_sum = quant.dequantize(quant.quantize(STACK * 2, leaf.format))
        np.testing.assert_array_equal(leaf.used(STACK * 2), packed_sum)
        np.testing.assert_array_equal(quant.dequantize(leaf.summed(STACK * 2)), packed_sum)
    else:
        assert kept is leaf
        np.testing.assert_array_equal(quant.unpacked(leaf), quant.dequantize(leaf))


def test_an_array_answers_for_itself():
    assert not quant.is_packed(STACK) and not quant.packs_update(STACK) and not quant.packs_update(None)
    assert quant.unpacked(STACK) is quant.stored(STACK) is STACK
    assert quant.stored(STACK, jnp.float32).dtype == jnp.float32
