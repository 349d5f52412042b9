"""Fields are looked at where they are read."""

import dataclasses
import functools

import pytest
import transformers

from jlora.families import FAMILIES, kinds
from jlora.families.fields import HARMLESS, Fields
from jlora.models import build

LLAMA = transformers.LlamaConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
).to_dict()


def resolved(config):
    return dataclasses.replace(build(config).config, source="{}")


@functools.cache
def read_by_any():
    """Every field that some family reads from a config of its own."""
    seen = set()
    for model_type, family in FAMILIES.items():
        fields = Fields(transformers.CONFIG_MAPPING[model_type]().to_dict())
        family.read(fields)
        family.read(fields.replaced(layer_types=None, no_rope_layers=None, use_sliding_window=True))
        seen |= fields.seen
    assert {"n_embd", "max_window_layers", "no_rope_layer_interval", "logits_scaling", "rotary_pct"} <= seen
    return seen


@pytest.mark.parametrize("value", [-1, 0, 1.5, True, "none", [], [[0]], {}, {"a": None}], ids=repr)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_not_read_may_be_anything_and_changes_nothing(model_type, value):
    plain = transformers.CONFIG_MAPPING[model_type]().to_dict()
    fields = Fields(plain)
    FAMILIES[model_type].read(fields)
    unread = read_by_any() | {*kinds.FIELDS, *kinds.ROTARY, *HARMLESS, "mrope_section"}
    unread -= fields.seen | {"eos_token_id"}
    added = plain | dict.fromkeys(unread, value)
    if rope := plain.get("rope_parameters"):

        def with_unread(given):
            unscaled = given.get("rope_type", "default") == "default"
            return {"mrope_section": value} | ({"factor": value} if unscaled else {}) | given

        own = {name: with_unread(given) for name, given in rope.items() if name in LAYERS}
        added["rope_parameters"] = own or with_unread(rope)
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
