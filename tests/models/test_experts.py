"""Mixtures on a mesh, where every device sorts its own tokens."""

import jax
import numpy as np
import pytest

from jlora import models, sharding

SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CASES = {
    "mixtral": SIZES | dict(model_type="mixtral", num_local_experts=5, num_experts_per_tok=2),
    "gemma4_text": SIZES
    | dict(model_type="gemma4_text", head_dim=12, global_head_dim=20, hidden_size_per_layer_input=0)
    | dict(enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=20),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_gives_the_logits_of_one_device(case):
    model = models.build(CASES[case])
    params = model.random_params(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 101, (4, 12))
    alone = np.asarray(model(params, tokens))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with sharding.on(mesh):
        split = np.asarray(model(sharding.shard(params, mesh), tokens))
    np.testing.assert_allclose(split, alone, atol=1e-5 * np.abs(alone).max())
