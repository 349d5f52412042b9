"""Merged equals factored, on dense and packed bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import lora, models, quant, tree
from jlora.lora import merging

SIZES = dict(
    model_type="llama", vocab_size=31, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)


@pytest.mark.parametrize("packed", [False, True])
def test_the_merged_model_computes_what_the_adapted_one_does(packed):
    model = models.build(SIZES)
    base = jax.jit(model.random_params)(jax.random.key(0))
    if packed:
        config = quant.as_config("nf4")
        base = tree.map_with_path(
            lambda path, leaf: quant.quantize(leaf) if quant.leaf_format(path, config) else leaf, base
        )
    params = lora.init(base, lora.LoraConfig(r=4, init_lora_weights=False), jax.random.key(1))
    merged = lora.merge(params)
    tokens = jnp.arange(9)[None]
    adapted = model(params, tokens)
    np.testing.assert_allclose(model(merged, tokens), adapted, rtol=1e-4, atol=1e-4)
    assert np.abs(adapted - model(base, tokens)).max() > 0.01
    assert not [path for path in tree.flatten(merged) if "lora" in path]


def test_unmerging_is_to_go_on_with_the_old_tree():
    params = lora.init(
        jax.jit(models.build(SIZES).random_params)(jax.random.key(0)), lora.LoraConfig(r=4), jax.random.key(1)
    )
    before = {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}
    lora.merge(params)
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(leaf, before[path], strict=True)


@pytest.mark.parametrize("own", [dict(target_modules=["lm_head"]), dict(modules_to_save=["lm_head"])])
def test_token_rows_and_a_tied_head_of_its_own(own):
    model = models.build(SIZES | dict(tie_word_embeddings=True))
    config = lora.LoraConfig(r=3, trainable_token_indices=[2, 5], **dict(target_modules=["q_proj"]) | own)
    params = lora.init(jax.jit(model.random_params)(jax.random.key(0)), config, jax.random.key(1))
    frozen, trainable = lora.split(params)
    params = lora.combine(frozen, jax.tree.map(lambda leaf: leaf + 0.1, trainable))
    tokens = jnp.arange(9)[None]
    np.testing.assert_allclose(model(lora.merge(params), tokens), model(params, tokens), atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_stack_is_merged_layer_by_layer_to_the_same_bits(dora, monkeypatch):
    base = {"layers": {"up_proj": {"kernel": jax.random.normal(jax.random.key(0), (3, 80, 48)).astype(jnp.bfloat16)}}}
    config = lora.LoraConfig(r=4, init_lora_weights=False, target_modules=["up_proj"], use_dora=dora)
    params = lora.init(base, config, jax.random.key(1))
    whole = {dtype: lora.merged_leaf(params["layers"]["up_proj"], "kernel", dtype) for dtype in (None, jnp.float32)}
    shapes, one = [], merging.merged_leaf
    monkeypatch.setattr(merging, "merged_leaf", lambda m, *rest: shapes.append(m["kernel"].shape) or one(m, *rest))
    for dtype, expected in whole.items():
        found = lora.merge(params, dtype)["layers"]["up_proj"]["kernel"]
        np.testing.assert_array_equal(found, expected, strict=True)
    assert shapes == 6 * [(80, 48)]


def test_the_sum_is_rounded_once():
    kernel = jax.random.normal(jax.random.key(0), (32, 16)).astype(jnp.bfloat16)
    module = {
        "kernel": kernel,
        "lora_a": jnp.ones((32, 1)),
        "lora_b": jnp.full((1, 16), 4e-3),
        "lora_scale": jnp.float32(0.25),
    }
    merged = lora.merge({"proj": module})["proj"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, (kernel.astype(jnp.float32) + 1e-3).astype(jnp.bfloat16))
