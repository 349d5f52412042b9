"""Fields are looked at where they are read; two models of one architecture compute the same from the same weights."""

import dataclasses

import pytest
import transformers

from jlora.models import build, kinds
from jlora.models.config import Fields
from jlora.models.families import FAMILIES, HARMLESS

LLAMA = transformers.LlamaConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
).to_dict()
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 8}
GPT = {"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 37}


@pytest.mark.parametrize(
    ("one", "other", "faults"),
    [
        (LLAMA, {"max_position_embeddings": 99, "eos_token_id": 5, "dtype": "float16", "use_cache": False}, []),
        (LLAMA, {"rms_norm_eps": 0.5, "tie_word_embeddings": True}, ["norm_eps: 1e-06 and 0.5", "tie_word_embeddings"]),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, ["ropes[0]: Rope"]),
        (LLAMA | YARN, {"max_position_embeddings": 99}, ["original_max_position_embeddings=99"]),
        (MISTRAL, {"sliding_window": 9}, ["layers[0]: Layer(window=8", "layers[1]: Layer(window=8"]),
        (GPT, {"n_positions": 99}, ["max_position_embeddings: 1024 and 99"]),
        (GPT, LLAMA, ["model_type: 'gpt2' and 'llama'", "names: Names("]),
    ],
)
def test_what_differs_is_named(one, other, faults):
    models = build(one), build(one | other)
    if not faults:
        models[0].config.require_same(models[1].config, "one", "other")
        return
    with pytest.raises(ValueError, match=r"^one and other are not models of one architecture") as error:
        models[0].config.require_same(models[1].config, "one", "other")
    assert all(fault in str(error.value) for fault in faults)
    assert len(str(error.value).splitlines()) > len(faults)


def resolved(config):
    return dataclasses.replace(build(config).config, source="{}")


@pytest.mark.parametrize("value", [-1, 0, 1.5, True, "none", [], [[0]], {}, {"a": None}], ids=repr)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_not_read_may_be_anything_and_changes_nothing(model_type, value):
    plain = transformers.CONFIG_MAPPING[model_type]().to_dict()
    fields = Fields(plain)
    FAMILIES[model_type](fields)
    unread = {*kinds.FIELDS, *kinds.ROTARY, *HARMLESS, "mrope_section"} - fields.seen - {"eos_token_id"}
    added = plain | dict.fromkeys(unread, value)
    if rope := plain.get("rope_parameters"):
        own = {
            name: given | {"mrope_section": value, "factor": value} for name, given in rope.items() if name in LAYERS
        }
        added["rope_parameters"] = own or rope | {"mrope_section": value, "factor": value}
    assert resolved(added) == resolved(plain)


LAYERS = ("full_attention", "sliding_attention")
SMOL = LLAMA | {"model_type": "smollm3", "num_hidden_layers": 3, "num_key_value_heads": 3, "rope_parameters": None}


@pytest.mark.parametrize(
    ("config", "same"),
    {
        "no windows": (
            LLAMA
            | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": -1, "max_window_layers": "x"},
            LLAMA | {"model_type": "qwen2"},
        ),
        "windows from the layer before the first": (
            LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": -1},
            LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
        ),
        "flags": (SMOL | {"no_rope_layers": [True, False, True]}, SMOL | {"no_rope_layers": [1, 0, 1]}),
        "a longer list": (SMOL | {"no_rope_layers": [1, 0, 1, 1]}, SMOL | {"no_rope_layers": [1, 0, 1]}),
        "no interval": (
            SMOL | {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 0},
            SMOL | {"no_rope_layers": [1, 0, 1]},
        ),
        "no pattern": (
            LLAMA | {"model_type": "gemma3_text", "layer_types": LAYERS[:1] * 2, "sliding_window_pattern": 0},
            LLAMA | {"model_type": "gemma3_text", "sliding_window_pattern": 1},
        ),
    }.values(),
)
def test_what_a_setting_leaves_unread_refuses_nothing(config, same):
    assert resolved(config | {"layer_types": list(config.get("layer_types") or ()) or None}) == resolved(same)


def test_everything_that_is_wrong_is_named_at_once():
    rope = {"rope_type": "linear", "factor": "z", "rope_theta": -1}
    wrong = {"hidden_size": "x", "rms_norm_eps": [], "rope_parameters": rope, "eos_token_id": "end", "vocab_size": None}
    with pytest.raises(ValueError, match=r"^config\.json:\n") as error:
        build(LLAMA | wrong)
    lines = [line.split(",")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(lines) == [
        "eos_token_id is 'end'",
        "hidden_size is 'x'",
        "rms_norm_eps is []",
        "rotary parameter factor is 'z'",
        "rotary parameter rope_theta is -1",
        "vocab_size is missing",
    ]
