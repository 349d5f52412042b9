"""Mixtures on a mesh, where every device sorts its own tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import lora, models, sharding

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


@pytest.mark.parametrize("case", ["mixtral", pytest.param("gemma4_text", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_logits_of_one_device(case):
    model = models.build(CASES[case])
    params = jax.jit(model.random_params)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 101, (4, 12))
    alone = np.asarray(model(params, tokens))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with sharding.on(mesh):
        split = np.asarray(model(sharding.shard(params, mesh), tokens))
    np.testing.assert_allclose(split, alone, atol=1e-5 * np.abs(alone).max())


def test_a_mesh_gives_the_gradients_of_one_device():
    """Of adapters of the MLP for every token and of the linears around experts, which a device has for its tokens."""
    fields = dict(n_routed_experts=4, moe_intermediate_size=20, moe_latent_size=12, num_experts_per_tok=2)
    fields |= dict(moe_shared_expert_intermediate_size=28, layers_block_type=["moe"], model_type="nemotron_h")
    model = models.build(SIZES | fields)
    config = lora.LoraConfig(r=3, init_lora_weights=False)
    frozen, trainable = lora.split(
        lora.init(jax.jit(model.random_params)(jax.random.key(0)), config, jax.random.key(1))
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 101, (4, 12)))

    @jax.jit
    def gradients(trainable, frozen):
        return jax.grad(lambda x: jnp.sum(jnp.sin(model.hidden(lora.combine(frozen, x), tokens)[0])))(trainable)

    alone = gradients(trainable, frozen)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with sharding.on(mesh):
        split = gradients(sharding.shard(trainable, mesh), sharding.shard(frozen, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), split, alone)
