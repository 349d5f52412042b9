"""What products with packed kernels are compiled to, on devices that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import quant


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_tpu_dequantises_few_rows_kernels_inside_their_product(monkeypatch, format, rows):
    """In a loop over layers: nothing of a kernel's size is stored, and no scale is gathered."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[:1]
    mesh = Mesh(np.array(chip), ("device",))

    def placed(values):
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), values)

    def packed(*shape):
        return jax.eval_shape(lambda: quant.quantize(jnp.zeros(shape, jnp.bfloat16), format))

    def run(x, kernels):
        def layer(x, kernels):
            up, down = kernels
            return quant.matmul(jax.nn.gelu(quant.matmul(x, up)), down), None

        return jax.lax.scan(layer, x, kernels)[0]

    layers, inputs, outputs = 3, 1024, 3072
    kernels = placed((packed(layers, inputs, outputs), packed(layers, outputs, inputs)))
    x = placed(jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16))
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(x, kernels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < inputs * outputs / 2
    assert " gather(" not in compiled.as_text()
