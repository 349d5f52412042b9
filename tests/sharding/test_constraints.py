"""Constraints hold where a mesh is in context, and nowhere else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jlora import quant, sharding


@pytest.fixture
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))


def test_jit_knows_the_mesh_of_its_arguments_and_keeps_no_trace_of_it(mesh):
    seen = []

    @functools.partial(sharding.jit, static_argnums=0)
    def doubled(factor, x):
        seen.append(sharding.ways("data", "fsdp"))
        return sharding.constrain(factor * x, sharding.ROWS, None)

    x = jnp.arange(32.0).reshape(8, 4)
    spread = jax.device_put(x, sharding.replicated(mesh))
    for _ in range(2):
        assert doubled(2, x).sharding.num_devices == 1
        assert doubled(2, spread).sharding.spec == P(("data", "fsdp"))
    assert seen == [1, 4]
    assert doubled.lower(2, spread).compile().output_shardings.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(doubled(2, spread), 2 * x)
    assert sharding.ways("data", "fsdp") == 1


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((8, 6), (sharding.ROWS, "tensor"), P(("data", "fsdp"), "tensor")),
        ((6, 6), (sharding.ROWS, None), P("data", None)),  # three rows on each of two devices cannot be split again
        ((3, 5), (sharding.ROWS, "tensor"), P(None, None)),
        ((8, 6), ("sequence", None), P(None, None)),
    ],
)
def test_axes_that_do_not_divide_are_left_out(mesh, shape, axes, spec):
    with sharding.on(mesh):
        out = jax.jit(lambda x: sharding.constrain(x, *axes))(
            jax.device_put(jnp.ones(shape), sharding.replicated(mesh))
        )
    assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 2)


def test_activations_lie_by_rows_and_tokens(mesh):
    x = jax.device_put(jnp.ones((8, 4, 6)), sharding.replicated(mesh))
    placed = sharding.jit(lambda x: (sharding.held(x), sharding.held(x, "tensor")))(x)
    assert [each.sharding.spec for each in placed] == [P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")]


def test_another_programs_mesh_is_left_alone():
    other = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(other.abstract_mesh):
        x = jnp.ones((8, 2))
        assert sharding.constrain(x, sharding.ROWS, None) is x


def test_axes_that_are_manual_are_divided_over_already(mesh):
    def inside(x):
        return sharding.held(x) * sharding.ways("data", "fsdp", "tensor")

    sharded = jax.shard_map(inside, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")))
    np.testing.assert_array_equal(jax.jit(sharded)(jnp.ones((8, 2, 4))), np.ones((8, 2, 4)))


def test_gathered_leaves_keep_what_tensor_splits_and_their_gradients_go_back(mesh):
    module = {"kernel": jnp.ones((64, 32)), "lora_a": jnp.ones((64, 4)), "lora_scale": jnp.float32(2)}
    placed = {
        name: jax.device_put(leaf, sharding.leaf_sharding(f"q_proj/{name}", leaf, mesh))
        for name, leaf in module.items()
    }

    @sharding.jit
    def gathered(leaves):
        used, back = jax.vjp(lambda leaves: sharding.gathered("q_proj", leaves), leaves)
        return used, back(used)[0]

    used, grads = gathered(placed)
    assert used["kernel"].sharding.spec == P(None, "tensor")
    assert used["lora_a"].sharding.is_fully_replicated
    for name, leaf in placed.items():
        assert grads[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
        np.testing.assert_array_equal(grads[name], leaf)


def test_packed_leaves_are_gathered_as_they_are_packed(mesh):
    kernel = quant.quantize(jax.random.normal(jax.random.key(0), (256, 32)))
    placed = jax.device_put(kernel, sharding.leaf_sharding("o_proj/kernel", kernel, mesh))
    used = sharding.jit(lambda kernel: sharding.gathered("o_proj", {"kernel": kernel})["kernel"])(placed)
    assert used.codes.dtype == jnp.uint8
    assert used.codes.sharding.spec == used.absmax.sharding.spec == P("tensor")
    jax.tree.map(np.testing.assert_array_equal, used, kernel)


def test_logits_are_split_over_a_vocabulary_that_divides(mesh):
    with sharding.on(mesh):
        assert sharding.logits_axes(64) == (("data",), ("tensor", "fsdp"))
        assert sharding.logits_axes(66) == (("data", "fsdp"), ("tensor",))
        assert sharding.logits_axes(33) == (("data", "fsdp"), ())
    assert sharding.logits_axes(64) == ((), ())
