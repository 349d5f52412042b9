"""What folders say for readers that do not know transformers 5's names; the slow tests open them there."""

import json

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from jlora import hub, models
from jlora.hub.checkpoints.older import for_every_reader, save_tokenizer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0]}
SIZES = dict(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, vocab_size=40)
PHI3 = dict(
    model_type="phi3",
    max_position_embeddings=64,
    original_max_position_embeddings=16,
    rope_parameters=dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5, **LONG),
)


@pytest.mark.parametrize(
    ("config", "added"),
    {
        "dtype": ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        "default": ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        "scaled": ({"rope_parameters": {"rope_theta": 5e5, **YARN}}, {"rope_theta": 5e5, "rope_scaling": YARN}),
        "experts": ({"model_type": "qwen3_moe", "num_local_experts": 5}, {"num_experts": 5}),
        "of mixtral": ({"model_type": "mixtral", "num_local_experts": 5}, {}),
        "gpt_neox": (
            {
                "model_type": "gpt_neox",
                "rope_parameters": {"rope_theta": 1e5, "rope_type": "default", "partial_rotary_factor": 0.5},
            },
            {"rotary_emb_base": 1e5, "rotary_pct": 0.5},
        ),
        "phi3": (
            PHI3 | {"rope_parameters": PHI3["rope_parameters"] | {"factor": 4.0}},  # 64 / 16 as it is
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": {"type": "longrope", **LONG}},
        ),
        "gemma3_text": (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        # transformers 5 takes the old field before the new one, so the new one is not written into it.
        "both": ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1.0, "rope_type": "default"}}, {}),
        "both, with windows": (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}},
            },
            {"rope_theta": 1e6},
        ),
        "neither": ({"model_type": "gpt2", "rope_parameters": None}, {}),
    }.values(),
)
def test_config_json_for_transformers_4(config, added):
    assert for_every_reader(config) == config | added


@pytest.mark.parametrize(
    "more",
    [
        {"factor": 2.0},
        {"attention_factor": 1.7},
        {"factor": 2.0, "attention_factor": 1.7, "original_max_position_embeddings": 16},
        {"rope_type": "linear", "factor": 2.0, "short_factor": None, "long_factor": None},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=str,
)
def test_what_phi3_cannot_say_in_transformers_4_is_not_lost_in_5(more, tmp_path):
    config = PHI3 | SIZES | {"pad_token_id": 0, "rope_parameters": PHI3["rope_parameters"] | more}
    model = models.build(config)
    params = jax.jit(model.random_params)(jax.random.key(0))
    hub.save_model(tmp_path / "out", model, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_scaling" not in written and written["rope_theta"] == 1e4
    ids = np.arange(1, 31)[None]
    expected = np.asarray(model(params, ids))
    again, read = hub.load(tmp_path / "out", dtype="float32")
    np.testing.assert_allclose(np.asarray(again(read, ids)), expected, rtol=1e-5, atol=1e-6)
    if more.get("rope_type", "longrope") == "longrope":  # transformers opens no Phi-3 of another type
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            found = theirs(torch.from_numpy(ids)).logits.numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def byte_level():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|end|>", "<tool>"]
    )


def written(tokenizer, folder):
    save_tokenizer(tokenizer, folder)
    return json.loads((folder / "tokenizer_config.json").read_text())


def test_tokenizer_config_json_for_transformers_4(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages[0].content }}"
    config = written(tokenizer, tmp_path)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|end|>", "<tool>"] and "extra_special_tokens" not in config
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == tokenizer.chat_template
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("a<tool></s>").input_ids == tokenizer("a<tool></s>").input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.chat_template == tokenizer.chat_template


def test_several_templates_are_listed_by_name(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "one", "tool_use": "two"}
    config = written(tokenizer, tmp_path)
    assert config["chat_template"] == [
        {"name": "default", "template": "one"},
        {"name": "tool_use", "template": "two"},
    ]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("begin", "end"), [(True, False), (False, False), (True, True)])
def test_classes_that_add_tokens_by_a_setting_are_told_it(tmp_path, begin, end):
    vocab = {symbol: i for i, symbol in enumerate(["<unk>", "<s>", "</s>", *"▁abc"])}
    tokenizer = transformers.LlamaTokenizer(vocab=vocab, merges=[], add_bos_token=begin, add_eos_token=end)
    config = written(tokenizer, tmp_path)
    assert (config["add_bos_token"], config["add_eos_token"]) == (begin, end)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == tokenizer("ab").input_ids
