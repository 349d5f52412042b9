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


@pytest.fixture(scope="module")
def bank(loaded):
    """Two adapters, and their sum as a third, for what a mixture of them is to be."""
    _, params, _ = loaded
    adapters = {}
    for seed, name in enumerate(("one", "two")):
        settings = dict(r=2 + seed, lora_alpha=300, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        adapters[name] = jlora.lora.init(params, jlora.LoraConfig(**settings), jax.random.key(seed))
    adapters["sum"] = jlora.lora.mix(params, list(adapters.values()), [0.5, 0.5])[0]
    return jlora.lora.Bank.of(params, adapters)


MIXED = {"one": 0.5, "two": 0.5}


@pytest.mark.parametrize(
    ("prompts", "choices"),
    [
        ([*PROMPTS, "the fourth", "x" * 70, "five"] * 2, ["two", "one", None, MIXED, "two", "one", None] + ["one"] * 5),
        (["a"] * 12, ["one", "two", None, MIXED] * 3),
        (PROMPTS, None),
    ],
    ids=["of different lengths", "repeated", "without a choice"],
)
def test_every_prompt_is_answered_as_by_its_adapter_alone(loaded, bank, prompts, choices):
    model, _, tokenizer = loaded
    settings = dict(max_new_tokens=6, batch_size=4)
    found = jlora.generate(model, bank, tokenizer, prompts, adapters=choices, **settings)
    names = [None] * len(prompts) if choices is None else ["sum" if choice is MIXED else choice for choice in choices]
    alone = {name: jlora.generate(model, bank.alone(name), tokenizer, prompts, **settings) for name in set(names)}
    assert found == [alone[name][number] for number, name in enumerate(names)]
    assert len({texts[0] for texts in alone.values()}) == len(alone)


def test_adapters_are_chosen_of_a_bank_and_for_every_prompt(loaded, bank):
    model, params, tokenizer = loaded
    with pytest.raises(ValueError, match="adapters: found 2, expected one for each of 3 prompts"):
        jlora.generate(model, bank, tokenizer, PROMPTS, adapters=["one", None])
    with pytest.raises(ValueError, match="adapters: found some, expected none without a bank"):
        jlora.generate(model, params, tokenizer, PROMPTS, adapters=["one", None, None])
    with pytest.raises(ValueError, match=r"params of Bank.choose, .* give the bank, and adapters="):
        jlora.generate(model, bank.choose(["one", "two", None]), tokenizer, PROMPTS)


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
