"""What folders say for readers that do not know transformers 5's names; the slow tests open them there."""

import json

import pytest
import tokenizers
import transformers

from jlora.hub.older import for_every_reader, save_tokenizer

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0]}


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
            {
                "model_type": "phi3",
                "rope_parameters": LONG
                | {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
                | {"original_max_position_embeddings": 16},
            },
            {
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 16,
                "rope_scaling": {"type": "longrope", **LONG},
            },
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
        "neither": ({"model_type": "gpt2", "rope_parameters": None}, {}),
    }.values(),
)
def test_config_json_for_transformers_4(config, added):
    assert for_every_reader(config) == config | added


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
