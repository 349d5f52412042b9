"""StarCoder 2: LayerNorms, biases everywhere, an MLP without a gate."""

from jlora.families.family import Family, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import SIZES, WINDOW, Gguf, Reading
from jlora.families.kinds import FLAG, NUMBER
from jlora.families.reading import common

GELU = {"hidden_act": "gelu_pytorch_tanh"}
EPSILON = "norm_epsilon"


def read(fields: Fields) -> Values:
    bias = fields.get("use_bias", True, FLAG)
    values = common(fields, num_key_value_heads=2, tied=True, activation=tuple(*GELU.items()))
    return values | {
        "norm": "layer",
        "norm_eps": fields.get(EPSILON, 1e-5, NUMBER),
        "gated": False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "layers": (Layer(window=fields.get("sliding_window")),) * values["num_hidden_layers"],
    }


FAMILY = Family(
    model_types=("starcoder2",),
    class_name="Starcoder2ForCausalLM",
    read=read,
    names=Names(mlp_up=("c_fc",), mlp_down="c_proj"),
    score="Starcoder2",
    gguf=Gguf(
        "starcoder2",
        Reading(
            required={**SIZES, EPSILON: "attention.layer_norm_epsilon"},
            optional=WINDOW,
            constants=GELU,
            biases={"use_bias": "blk.0.attn_q.bias"},
        ),
        all_biases=True,
    ),
)
