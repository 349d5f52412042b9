"""Gemma 2: norms before and after attention and MLP, soft caps, a window in every other layer."""

import functools

from jlora.families.family import Family, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.gemma import read_common
from jlora.families.gguf import SOFT_CAPS, Config, Gguf, Metadata, Reading, heads, windows
from jlora.families.kinds import NUMBER, POSITIVE
from jlora.families.layouts import PLUS_ONE
from jlora.families.reading import nullable, read_windows

NAMES = Names(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
PERIOD = 2  # layers


def read(fields: Fields) -> Values:
    values = read_common(fields, "hidden_activation")
    count = values["num_hidden_layers"]
    window = fields.get("sliding_window", 4096)
    windows = read_windows(fields, window, count, lambda: [i % PERIOD == 0 for i in range(count)])
    return values | {
        "attention_scale": read_scale(fields),
        "attention_softcap": nullable(fields, "attn_logit_softcapping", 50.0, NUMBER),
        "final_softcap": nullable(fields, "final_logit_softcapping", 30.0, NUMBER),
        "layers": tuple(Layer(window=window) for window in windows),
    }


def read_scale(fields: Fields) -> float:
    return fields.get("query_pre_attn_scalar", 256, POSITIVE) ** -0.5


def from_gguf(metadata: Metadata, config: Config, *, window: int | None, period: int, largest: int) -> Config:
    """Layers with a window, and the scores' scale, which llama.cpp infers from the number of layers.

    Args:
        largest: the number of layers of the model whose scale follows from the width.
    """
    found = heads(metadata, config) | windows(metadata, config, window=window, period=period)
    shared = config["hidden_size"] // config["num_attention_heads"]
    return found | {"query_pre_attn_scalar": shared if config["num_hidden_layers"] == largest else found["head_dim"]}


FAMILY = Family(
    model_types=("gemma2",),
    class_name="Gemma2ForCausalLM",
    read=read,
    names=NAMES,
    score="Gemma2",
    gguf=Gguf(
        "gemma2",
        Reading(
            optional=SOFT_CAPS,
            constants=GELU,
            more=functools.partial(from_gguf, window=4096, period=PERIOD, largest=46),
        ),
        layouts=PLUS_ONE,
        period=PERIOD,
        own_head=False,
    ),
)
