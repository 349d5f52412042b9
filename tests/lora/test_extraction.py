"""An adapter from two trees: exact where the change is narrow, the best of its rank where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import jlora
from jlora import lora, quant, tree
from jlora.models import build

MODEL = build(
    transformers.Qwen3MoeConfig(
        vocab_size=41,
        hidden_size=24,
        intermediate_size=40,
        moe_intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
    ).to_dict()
)
BASE = jax.jit(MODEL.random_params)(jax.random.key(0))
TIED = dict(
    vocab_size=41,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    tie_word_embeddings=True,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 41, (2, 9)), jnp.int32)


def noisy(scale=0.02, only=""):
    def moved(path, leaf):
        return leaf + scale * jax.random.normal(jax.random.key(len(path)), leaf.shape) if only in path else leaf

    return tree.map_with_path(moved, BASE)


def test_what_a_lora_changed_comes_back_whole():
    config = jlora.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2])
    frozen, trainable = lora.split(lora.init(BASE, config, jax.random.key(1)))
    trainable = jax.tree.map(lambda leaf: leaf + 0.3, trainable)
    tuned = lora.merge(lora.combine(frozen, trainable))
    params, report = lora.extract(BASE, tuned, rank=3)
    np.testing.assert_allclose(MODEL(params, TOKENS), MODEL(tuned, TOKENS), atol=2e-5)
    assert np.abs(MODEL(tuned, TOKENS) - MODEL(BASE, TOKENS)).max() > 0.1
    assert report.energy_kept == pytest.approx(1, abs=1e-9)
    shared, _ = lora.extract(BASE, tuned, rank=0.999999)
    np.testing.assert_allclose(MODEL(shared, TOKENS), MODEL(tuned, TOKENS), atol=1e-3)


@pytest.mark.parametrize("settings", [dict(target_modules=["embed_tokens"]), dict(modules_to_save=["embed_tokens"])])
def test_a_tied_embedding_is_tied_again(settings, tmp_path):
    model = build(transformers.LlamaConfig(**TIED).to_dict())
    base = jax.jit(model.random_params)(jax.random.key(0))
    tuned = base | {"embed_tokens": {"embedding": base["embed_tokens"]["embedding"] + 0.3}}
    params, report = lora.extract(base, tuned, rank=1, **settings)
    assert report.energy_kept == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(model(params, TOKENS), model(tuned, TOKENS), atol=1e-5)
    assert np.abs(model(tuned, TOKENS) - model(base, TOKENS)).max() > 0.1
    jlora.save_adapter(tmp_path, params)
    np.testing.assert_allclose(model(jlora.load_adapter(base, tmp_path), TOKENS), model(tuned, TOKENS), atol=1e-5)


def test_each_product_is_the_best_of_its_rank_and_what_is_left_is_counted():
    tuned = noisy()
    params, report = lora.extract(BASE, tuned, rank=2, modules_to_save=["input_layernorm"])
    kept, total = 0.0, 0.0
    flat, base, after = (tree.flatten(one) for one in (lora.merge(params), BASE, tuned))
    for path, leaf in after.items():
        change = np.asarray(leaf - base[path], np.float64)
        if path.endswith("/kernel") and path != "lm_head/kernel":
            matrices = change.reshape(-1, *change.shape[-2:])
            best = sum(np.sum(np.linalg.svd(matrix, compute_uv=False)[:2] ** 2) for matrix in matrices)
            found = np.sum(np.asarray(flat[path] - base[path], np.float64) ** 2)
            if "experts" not in path:  # "all-linear" leaves the fused parameters of experts alone
                assert found == pytest.approx(best, rel=1e-4), path
                kept += best
            total += np.sum(change**2)
        elif "input_layernorm" in path:
            np.testing.assert_array_equal(flat[path], leaf)
        else:
            total += np.sum(change**2)
    assert report.energy_kept == pytest.approx(kept / total, rel=1e-3)
    assert "post_attention_layernorm/scale" in str(report)


def test_packed_models_are_compared_by_what_they_compute():
    def packed(params):
        return tree.map_with_path(
            lambda path, leaf: quant.quantize(leaf, "int8") if path.endswith("_proj/kernel") else leaf, params
        )

    tuned = packed(noisy(0.1, "self_attn/q_proj/kernel"))
    params, _ = lora.extract(packed(BASE), tuned, rank=24, target_modules=["q_proj"])
    np.testing.assert_allclose(MODEL(params, TOKENS), MODEL(tuned, TOKENS), atol=2e-5)


def test_two_architectures_are_refused_with_every_difference():
    flat = tree.flatten(BASE)
    other = {path: leaf for path, leaf in flat.items() if path != "norm/scale"}
    other |= {"embed_tokens/embedding": jnp.zeros((43, 24)), "extra/kernel": jnp.zeros((2, 2))}
    with pytest.raises(ValueError) as error:
        lora.extract(BASE, tree.unflatten(other), rank=2)
    for words in (
        "norm/scale: only the base has it",
        "extra/kernel: only the tuned model has it",
        "embed_tokens/embedding: the base has (41, 24), the tuned model (43, 24)",
    ):
        assert words in str(error.value)
    two = {"layers": {"norm": {"scale": np.ones((2, 3))}, "up": {"kernel": np.ones((2, 3, 3))}}}
    for wrong, words in (("normm", "no module's name ends in normm"), ("0.norm", "of layers/norm it selects some")):
        with pytest.raises(ValueError, match=words):
            lora.extract(two, two, rank=2, modules_to_save=[wrong])
    with pytest.raises(ValueError, match="rank is 0"):
        lora.extract(BASE, BASE, rank=0)
