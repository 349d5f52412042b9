"""What a server's programs are compiled to, on devices that are not here."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from jlora import models, sharding, tree
from jlora.serve.programs import Programs
from jlora.train.planning import moved

SIZES = dict(model_type="llama", vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
SIZES |= dict(head_dim=128, num_attention_heads=4)
KERNEL = SIZES["hidden_size"] * 2 * SIZES["head_dim"] * 4  # bytes of the smallest kernel, that of two heads of keys
ROWS = 8


def made(devices, mesh, heads, size, shapes, dtype):
    """The programs of a model with so many heads of keys."""
    model = models.build(SIZES | dict(num_key_value_heads=heads))
    params = model.abstract_params(dtype)
    placed = tree.abstract(params, sharding.tree_shardings(params, sharding.make_mesh(mesh, devices)))
    return Programs(model, placed, ROWS, banked=False, sizes=[size], shapes=shapes)


def own(programs, size):
    """The bytes of a device's part of the cache."""
    stacks = jax.tree.leaves(programs.rows(size).cache.stacks)
    return sum(math.prod(kept.sharding.shard_shape(kept.shape)) * kept.dtype.itemsize for kept in stacks)


@pytest.mark.parametrize(("mesh", "held"), [({"tensor": 4}, 2), ({"data": 2, "tensor": 2}, 1)])
def test_devices_exchange_what_is_computed_and_neither_caches_nor_kernels(mesh, held):
    """Each holds all rows of one of two heads of keys, or of both if they are fewer than the devices."""
    devices, size, shapes = jax.devices()[: math.prod(mesh.values())], 512, [(1, 4), (4, 2)]
    programs = made(devices, sharding.MeshConfig(**mesh), 2, size, shapes, jnp.float32)
    assert own(programs, size) == 2 * SIZES["num_hidden_layers"] * ROWS * held * size * SIZES["head_dim"] * 4
    calls = [programs.step(size), *(programs.read(size, shape) for shape in shapes)]
    received = [sum(moved.received(call.as_text()).values()) for call in calls]
    assert 0 < max(received) < KERNEL // 2 < own(programs, size) / ROWS
    assert not moved.received(programs.copy(size).as_text() + programs.begin(size).as_text())


@functools.cache  # what is compiled for chips that are not here can't be read from JAX's folder a second time
def on_chips(heads, ways):
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:ways]
    return made(chips, sharding.MeshConfig(tensor=ways), heads, 4096, [(1, 32), (4, 16)], jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("reads", [None, (1, 32), (4, 16)])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("ways", [1, 4])
def test_no_program_copies_the_cache(monkeypatch, reads, heads, ways):
    """On TPUs, where the compiler lays arrays out as their scatters and gathers are the quickest.

    Narrower heads are another matter: XLA packs their tokens side by side, and unpacks them in some programs.
    """
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    programs = on_chips(heads, ways)
    compiled = programs.read(4096, reads) if reads else programs.step(4096)
    beside = compiled.memory_analysis().temp_size_in_bytes
    assert beside < (reads[0] if reads else 1) * own(programs, 4096) / ROWS
