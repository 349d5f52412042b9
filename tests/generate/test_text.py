"""Generation against transformers' generate, and laws of sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import jlora
from jlora.generate import sample

PROMPTS = ["a", "The second prompt is longer than the first. " * 2, "third"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return *jlora.load(folder), jlora.load_tokenizer(folder)


def test_greedy_text_is_transformers(folder, loaded):
    model, params, tokenizer = loaded
    reference = LlamaForCausalLM.from_pretrained(folder)
    ours = jlora.generate(model, params, tokenizer, PROMPTS, max_new_tokens=24, batch_size=2)
    for prompt, text in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            expected = reference.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(set(ours)) == 3


def test_a_packed_base_generates_what_its_dense_form_does(folder, loaded):
    _, _, tokenizer = loaded
    model, packed = jlora.load(folder, quant="nf4")
    dense = jlora.tree.map_with_path(
        lambda _, leaf: jlora.quant.dequantize(leaf) if jlora.quant.is_packed(leaf) else leaf, packed
    )
    texts = [jlora.generate(model, p, tokenizer, PROMPTS, max_new_tokens=8) for p in (packed, dense)]
    assert texts[0] == texts[1]


def test_samples_follow_the_seed_and_not_the_neighbours(loaded):
    def draw(prompts, **settings):
        return jlora.generate(*loaded, prompts, max_new_tokens=12, temperature=1.0, **settings)

    together = draw(PROMPTS, seed=1)
    assert together == draw(PROMPTS, seed=1, batch_size=1)
    assert together[:1] == draw(PROMPTS[:1], seed=1)
    assert together != draw(PROMPTS, seed=2)


def test_generation_ends_with_the_stop_token(loaded):
    model, params, tokenizer = loaded
    # a head whose likeliest token is always the stop token
    stopped = params | {"lm_head": {"kernel": jnp.zeros_like(params["lm_head"]["kernel"])}}
    assert jlora.generate(model, stopped, tokenizer, PROMPTS, max_new_tokens=5) == ["", "", ""]


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)
    rows = jnp.broadcast_to(logits, (4000, 4))

    def shares(**settings):
        tokens = sample(rows, keys, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings))
        return np.bincount(tokens, minlength=4) / 4000

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.75), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.03)


def test_bad_settings_and_prompts_are_named(loaded):
    model, params, tokenizer = loaded
    with pytest.raises(ValueError) as error:
        jlora.generate(model, params, tokenizer, PROMPTS, max_new_tokens=0, temperature=-1, top_p=0)
    for name in ("max_new_tokens=0", "temperature=-1", "top_p=0"):
        assert name in str(error.value)
    with pytest.raises(ValueError, match="prompt 1: found an empty prompt"):
        jlora.generate(model, params, tokenizer, ["a", ""])
    assert jlora.generate(model, params, tokenizer, []) == []
