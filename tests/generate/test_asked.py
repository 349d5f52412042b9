"""What is asked of a model: single prompts, short positions, and texts longer than a model was made for."""

import copy
import json
import warnings

import jax
import pytest
import torch
import transformers

import jlora
from jlora.generate import rollout
from jlora.generate.asked import as_prompts
from jlora.models import build
from jlora.train import resolve, run
from jlora.train.evaluation.records import evaluate, require_records

CHAT = [{"role": "user", "content": "b"}]


@pytest.fixture(scope="module")
def loaded(model_folder):
    return *jlora.load(model_folder), jlora.load_tokenizer(model_folder)


@pytest.fixture(scope="module")
def bank(loaded):
    _, params, _ = loaded
    config = jlora.LoraConfig(r=2, init_lora_weights=False, lora_alpha=300)
    return jlora.lora.Bank.of(params, {"one": jlora.lora.init(params, config, jax.random.key(0))})


@pytest.mark.parametrize("prompt", ["hello", CHAT], ids=["a text", "a chat"])
def test_one_prompt_needs_no_list_around_it(prompt, loaded, bank):
    model, params, tokenizer = loaded
    expected = jlora.generate(model, params, tokenizer, [prompt], max_new_tokens=6)
    assert len(expected) == 1
    assert jlora.generate(model, params, tokenizer, prompt, max_new_tokens=6, chat_template_kwargs={}) == expected
    of_bank = jlora.generate(model, bank, tokenizer, [prompt], max_new_tokens=6, adapters=["one"])
    assert jlora.generate(model, bank, tokenizer, prompt, max_new_tokens=6, adapters="one") == of_bank
    assert jlora.generate(model, bank, tokenizer, prompt, max_new_tokens=6, adapters={"one": 1.0}) == of_bank


def test_what_is_not_a_prompt_is_named_with_its_place(loaded, bank):
    model, _, tokenizer = loaded
    wrong = {
        "prompt 1: found an object with prompt": ["a", {"prompt": "b"}],
        "prompt 0: found a list with str": [["a", "b"]],
        "found an object with messages": {"messages": CHAT},
        "prompt 1: found a list with an object with text": ["a", [{"text": "b"}]],
    }
    for message, prompts in wrong.items():
        with pytest.raises(jlora.UserError, match=message):
            as_prompts(prompts)
    with pytest.raises(jlora.UserError, match=r"adapters: found 1 .without a list.* one for each of 2"):
        jlora.generate(model, bank, tokenizer, ["a", "b"], adapters="one")
    with pytest.raises(jlora.UserError, match="expected one choice for each row"):
        bank.choose("one")


def test_one_record_or_its_text_is_not_taken_for_several():
    for wrong in ({"prompt": "a", "completion": "b"}, "abc", ["abc"]):
        with pytest.raises(jlora.UserError, match="expected a list of records"):
            require_records(wrong)


POSITIONS = 16


@pytest.fixture(scope="module")
def short(byte_tokenizer, tmp_path_factory):
    """A GPT-2 of few positions."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("short")
    settings = dict(n_positions=POSITIONS, n_embd=24, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    config = transformers.GPT2Config(vocab_size=257, initializer_range=0.3, **settings)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder, *jlora.load(folder), byte_tokenizer


@pytest.mark.parametrize("new", [1, POSITIONS])
def test_prompts_that_fit_learned_positions_are_answered(new, short):
    folder, model, params, tokenizer = short
    tokenizer = build_without_end(tokenizer)
    prompts = ["a", "abcd"[: POSITIONS + 1 - new], "abcdefghijklmnopqrst"[: POSITIONS + 1 - new]]
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = jlora.generate(model, params, tokenizer, prompts, max_new_tokens=new, batch_size=2)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        tokens = reference.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=False)
        assert text == tokenizer.decode(tokens[0, ids.shape[1] :])
    keys = jax.random.split(jax.random.key(0), 2)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts[1:]]
    drawn = rollout(model, params, ids, keys, rows=2, max_new_tokens=new, stop_ids=(), temperature=0)
    assert [tokenizer.decode(one.tokens) for one in drawn.completions] == found[1:]


def build_without_end(tokenizer):
    """The tokenizer without an end of text, so that every text has all the tokens that it may."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    return tokenizer


def test_prompts_that_do_not_fit_are_counted(short):
    _, model, params, tokenizer = short
    prompts = ["a", "b" * POSITIONS, "c" * 99]
    with pytest.raises(
        jlora.UserError, match=r"too long for 13 tokens: 2 of 3 prompts \(1, 2\), .* 99: .*16 positions"
    ):
        jlora.generate(model, params, tokenizer, prompts, max_new_tokens=4)


SCALED = {
    "no scaling": ({}, 32),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 64),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, 96),
    "llama3": (
        {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 8}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        32,
    ),
}


@pytest.mark.parametrize("name", SCALED)
def test_the_longest_text_counts_what_scaling_adds(name):
    scaling, longest = SCALED[name]
    config = transformers.LlamaConfig(max_position_embeddings=32, vocab_size=9).to_dict()
    config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default"} | scaling
    found = build(config).config
    assert found.longest_text == longest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn_beyond(longest, "texts")
    with pytest.warns(UserWarning, match=rf"texts: up to {longest + 1} tokens.* {longest} "):
        found.warn_beyond(longest + 1, "texts")


@pytest.fixture(scope="module")
def small(make_llama):
    return make_llama(
        hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=16
    )


def test_texts_longer_than_a_model_was_made_for_are_warned_of_once(small, tmp_path):
    model, params = jlora.load(small)
    tokenizer = jlora.load_tokenizer(small)
    record = {"prompt": "a" * 12, "completion": "b" * 12}
    said = r"up to 2\d tokens, but the model was made for texts of up to 16"
    calls = {
        "generate": lambda: jlora.generate(model, params, tokenizer, ["a" * 12] * 2, max_new_tokens=9),
        "evaluate": lambda: evaluate(model, params, tokenizer, [record] * 3, generate_texts=False),
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    settings = {"model": {"path": small}, "data": {"path": str(tmp_path / "d.jsonl")}}
    settings["train"] = {"steps": 2, "batch_size": 1, "seq_len": 64}
    calls["train"] = lambda: run(resolve(settings), tmp_path / "run")
    for name, call in calls.items():
        with pytest.warns(UserWarning, match=said) as found:
            call()
        assert len([one for one in found if "was made for" in str(one.message)]) == 1, name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jlora.generate(model, params, tokenizer, ["a" * 7], max_new_tokens=9)
        evaluate(model, params, tokenizer, [{"prompt": "a", "completion": "b"}] * 40, generate_texts=False)
