"""Where leaves go on a mesh of eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import PartitionSpec as P

from jlora import models, quant, sharding, tree
from jlora.families import FAMILIES
from jlora.sharding.rules import RULES


@pytest.fixture
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("layers/self_attn/q_proj/kernel", (3, 64, 32), P(None, "fsdp", "tensor")),
        ("layers/self_attn/o_proj/kernel", (3, 64, 32), P(None, "tensor", "fsdp")),
        ("layers/self_attn/q_proj/lora_a", (3, 64, 4), P(None, "fsdp", None)),
        ("layers/self_attn/q_proj/lora_b", (3, 4, 32), P(None, None, ("tensor", "fsdp"))),
        ("layers/mlp/down_proj/lora_a", (3, 64, 4), P(None, ("tensor", "fsdp"), None)),
        ("layers/mlp/down_proj/lora_b", (3, 4, 32), P(None, None, "fsdp")),
        ("layers/self_attn/q_proj/lora_scale", (3,), P(None)),
        ("h/attn/c_attn/kernel", (3, 64, 32), P(None, "fsdp", "tensor")),
        ("h/mlp/c_proj/kernel", (3, 64, 32), P(None, "tensor", "fsdp")),
        ("gpt_neox/layers/attention/dense/kernel", (3, 64, 32), P(None, "tensor", "fsdp")),
        ("gpt_neox/layers/mlp/dense_h_to_4h/kernel", (3, 64, 32), P(None, "fsdp", "tensor")),
        ("layers/mlp/experts/down_proj/kernel", (3, 6, 64, 32), P(None, None, "tensor", "fsdp")),
        ("embed_tokens/embedding", (64, 32), P(("tensor", "fsdp"), None)),
        ("embed_tokens/lora_a", (64, 4), P(("tensor", "fsdp"), None)),
        ("lm_head/kernel", (32, 64), P(None, ("tensor", "fsdp"))),
        ("lm_head/lora_b", (4, 64), P(None, ("tensor", "fsdp"))),
        ("embed_out/lora_a", (32, 4), P(None, None)),
        # What fsdp does not divide on one side it may on the other, beyond what tensor splits there.
        ("layers/self_attn/q_proj/kernel", (3, 63, 32), P(None, None, ("tensor", "fsdp"))),
        ("layers/self_attn/o_proj/kernel", (3, 64, 30), P(None, ("tensor", "fsdp"), None)),
        ("layers/self_attn/q_proj/kernel", (3, 64, 33), P(None, "fsdp", None)),
        ("wte/embedding", (66, 32), P("tensor", None)),
        ("norm/scale", (64,), P(None)),
    ],
)
def test_specs(mesh, path, shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert sharding.leaf_sharding(path, leaf, mesh).spec == spec


def test_packed_parts_are_split_alike_and_blocks_stay_whole(mesh):
    leaf = quant.quantize(jnp.ones((2, 512, 32)))
    placed = sharding.leaf_sharding("layers/mlp/up_proj/kernel", leaf, mesh)
    assert placed.codes.spec == placed.absmax.spec == P(None, "fsdp", "tensor")
    assert placed.nested_absmax.spec == P()
    narrow = quant.quantize(jnp.ones((2, 192, 32)))  # three blocks do not divide by four
    placed = sharding.leaf_sharding("layers/mlp/up_proj/kernel", narrow, mesh)
    assert placed.codes.spec == placed.absmax.spec == P(None, None, ("tensor", "fsdp"))


def test_a_scale_of_all_inputs_is_split_over_outputs_only(mesh):
    leaf = quant.quantize(jnp.ones((2, 512, 32)), "int8")
    placed = sharding.leaf_sharding("layers/mlp/up_proj/kernel", leaf, mesh)
    assert placed.codes.spec == P(None, "fsdp", "tensor")
    assert placed.scale.spec == P(None, None, "tensor")


def test_each_device_holds_its_part_only(mesh):
    params = {"layers": {"up_proj": {"kernel": quant.quantize(jnp.ones((2, 512, 32)))}}}
    codes = sharding.shard(params, mesh)["layers"]["up_proj"]["kernel"].codes
    assert {shard.data.shape for shard in codes.addressable_shards} == {(2, 64, 16)}


def test_batches_are_split_by_rows(mesh):
    batch = {"tokens": np.arange(2 * 8 * 6, dtype=np.int32).reshape(2, 8, 6)}
    placed = sharding.put_batch(batch, mesh)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 6)}
    with pytest.raises(ValueError, match="has 6 rows of 6 tokens; the mesh splits rows 4 ways"):
        sharding.put_batch({"tokens": batch["tokens"][:, :6]}, mesh)


def test_numbers_of_items_are_on_every_device(mesh):
    batch = {"tokens": np.zeros((2, 8, 6), np.int32), "margin": np.arange(6, dtype=np.float32).reshape(2, 3)}
    placed = sharding.put_batch(batch, mesh)["margin"]
    assert len(placed.addressable_shards) == mesh.size
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, batch["margin"])


def test_mesh_sizes():
    assert dict(sharding.make_mesh(sharding.MeshConfig(data=-1, tensor=2)).shape)["data"] == 4
    assert sharding.make_mesh(sharding.MeshConfig()).size == 1
    with pytest.raises(ValueError, match="multiply to 3, but the number of devices is 8"):
        sharding.make_mesh(sharding.MeshConfig(data=3))
    with pytest.raises(ValueError, match="does not divide 8 devices"):
        sharding.make_mesh(sharding.MeshConfig(data=-1, tensor=3))
    with pytest.raises(ValueError, match="at most one of them -1"):
        sharding.MeshConfig(data=-1, fsdp=-1)


LEAVES = (
    *("kernel", "trained_kernel", "bias", "lora_a", "lora_b", "lora_start_a", "lora_start_b", "lora_scale"),
    *("lora_magnitude", "embedding", "trained_embedding"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linears_of_every_family_are_split_as_their_place_wants(family, mesh):
    """Outputs of the first of two linears over tensor, inputs of the second; the head over its vocabulary."""
    names = models.build(transformers.CONFIG_MAPPING[family]().to_dict()).config.names
    leaf = jax.ShapeDtypeStruct((2, 64, 32), jnp.float32)

    def spec(*path):
        return sharding.leaf_sharding("/".join((*path, "kernel")), leaf, mesh).spec

    first = [(names.attention, name) for name in names.queries_keys_values] + [("mlp", name) for name in names.mlp_up]
    assert {spec(names.stack, *path) for path in first} == {P(None, "fsdp", "tensor")}
    second = [(names.attention, names.output), ("mlp", names.mlp_down)]
    assert {spec(names.stack, *path) for path in second} == {P(None, "tensor", "fsdp")}
    assert spec(names.head) == P(None, None, ("tensor", "fsdp"))
    table = sharding.leaf_sharding(f"{names.embedding}/embedding", jax.ShapeDtypeStruct((64, 32), jnp.float32), mesh)
    assert table.spec == P(("tensor", "fsdp"), None)


def test_every_rule_matches_something_in_some_family():
    paths = set()
    for family in FAMILIES:
        names = models.build(transformers.CONFIG_MAPPING[family]().to_dict()).config.names
        linears = (*names.queries_keys_values, *names.latents, *names.mlp_up, *names.row_parallel)
        modules = (names.embedding, names.positions, names.head, *(f"{names.stack}/mlp/{linear}" for linear in linears))
        paths |= {f"{module}/{leaf}" for module in modules if module for leaf in LEAVES}
    tree.match_rules(RULES, paths)  # refuses a rule that matches nothing
    first = {next(i for i, (rule, _) in enumerate(RULES) if re.fullmatch(rule, path)) for path in paths}
    assert first == set(range(len(RULES)))  # and none stands behind one that takes all of its paths
