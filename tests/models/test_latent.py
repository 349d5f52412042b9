"""Latent attention: one token at a time is compared with what the cache keeps, many with the keys made from it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import lora, models, tree
from jlora.models import latent

CONFIG = dict(
    model_type="deepseek_v3",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    kv_lora_rank=10,
    q_lora_rank=14,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    moe_intermediate_size=12,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 9)))


@pytest.fixture(scope="module")
def model():
    return models.build(CONFIG)


@pytest.fixture(scope="module")
def base(model):
    return jax.jit(model.random_params)(jax.random.key(0))


def adapted(base, **settings):
    """An adapter that changes something everywhere: biases, which start as zeros, too."""
    config = jlora.LoraConfig(r=3, target_modules=["kv_b_proj", "q_b_proj"], init_lora_weights=False, **settings)
    params = lora.init(base, config, jax.random.key(1))
    return tree.map_with_path(lambda path, leaf: leaf + 0.3 * path.endswith("lora_bias"), params)


def decoded(model, params, prompt):
    """Logits of all tokens: a prompt at once, and then token by token."""
    cache, parts = model.empty_cache(params, batch=2, size=12), []
    edges = [0, prompt, *range(prompt + 1, TOKENS.shape[1] + 1)]
    for start, stop in itertools.pairwise(edges):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        hidden, cache = model.hidden(params, TOKENS[:, start:stop], positions, cache=cache)
        parts.append(hidden)
    return model.logits(params, jnp.concatenate(parts, axis=1))


@pytest.mark.parametrize(
    "settings", [None, pytest.param({}, marks=pytest.mark.slow), {"use_dora": True}, {"lora_bias": True}], ids=repr
)
def test_a_prompt_and_then_single_tokens_are_the_whole_text(settings, model, base):
    params = base if settings is None else adapted(base, **settings)
    expected = model(params, TOKENS)
    np.testing.assert_allclose(decoded(model, params, 5), expected, rtol=1e-4, atol=1e-5)
    if settings is not None:
        assert np.abs(expected - model(base, TOKENS)).max() > 1e-3


def test_single_tokens_make_no_keys(model, base, monkeypatch):
    made = []
    expand = latent.LatentAttention._expanded
    monkeypatch.setattr(latent.LatentAttention, "_expanded", lambda *args: made.append(1) or expand(*args))
    decoded(model, base, 5)
    assert len(made) == 2  # in the two layers, for the prompt


def test_the_cache_keeps_only_latents(model, base):
    stacks = model.empty_cache(base, batch=2, size=12).stacks
    assert {name: array.shape for name, array in stacks["latent"].items()} == {
        "latent": (2, 2, 1, 12, 10),
        "rotated": (2, 2, 1, 12, 4),
    }
    assert stacks.keys() == {"latent"}


def test_what_all_heads_share_is_whole_on_every_device(base):
    mesh = jlora.sharding.make_mesh(jlora.sharding.MeshConfig(fsdp=4, tensor=2))
    placed = tree.flatten(jlora.sharding.shard(adapted(base), mesh))
    used = {path.partition("/")[2]: tuple(leaf.sharding.spec) for path, leaf in placed.items()}
    narrow = (None, "fsdp", None)
    assert used["self_attn/kv_a_proj_with_mqa/kernel"] == narrow == used["self_attn/q_a_proj/kernel"]
    assert used["self_attn/q_b_proj/kernel"][2] == "tensor"


def test_sizes_that_do_not_fit_are_named(model):
    with pytest.raises(ValueError, match="n_routed_experts 4 cannot be divided into 3 groups"):
        models.build(CONFIG | {"n_group": 3})
    with pytest.raises(ValueError, match="num_key_value_heads 1 is not supported"):
        models.build(CONFIG | {"num_key_value_heads": 1})
    assert dataclasses.replace(model.config, source="") == dataclasses.replace(
        models.build(CONFIG | {"head_dim": 4, "num_nextn_predict_layers": 1}).config, source=""
    )
