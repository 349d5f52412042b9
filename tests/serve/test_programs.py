"""What a server's programs are compiled to, on devices that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import models, tree
from jlora.serve import rows as device
from jlora.serve.programs import idle, nothing

SIZES = dict(model_type="llama", vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
SIZES |= dict(head_dim=128, num_attention_heads=4)


@pytest.mark.slow
@pytest.mark.parametrize("reads", [None, (1, 32), (4, 16)])
@pytest.mark.parametrize("heads", [1, 4])
def test_no_program_copies_the_cache(monkeypatch, reads, heads):
    """On TPUs, where the compiler lays arrays out as their scatters and gathers are the quickest.

    Narrower heads are another matter: XLA packs their tokens side by side, and unpacks them in some programs.
    """
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1]
    mesh = Mesh(np.array(chip), ("device",))

    def placed(values):
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), values)

    model = models.build(SIZES | dict(num_key_value_heads=heads))
    params = placed(model.abstract_params(jnp.bfloat16))
    rows = placed(jax.eval_shape(lambda params: device.empty(model, params, 8, 4096), params))
    with jax.set_mesh(mesh):
        if reads:
            lowered = device.read.lower(model, params, rows, *placed(nothing(*reads, banked=False)))
        else:
            lowered = device.step.lower(model, params, rows, placed(idle(8, banked=False)))
        beside = lowered.compile().memory_analysis().temp_size_in_bytes
    one_row = tree.nbytes(rows.cache.stacks) / 8
    assert beside < (reads[0] if reads else 1) * one_row
