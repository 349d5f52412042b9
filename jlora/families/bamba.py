"""Bamba: Mamba-2 in most layers, and attention that rotates half of every head."""

from jlora.families.family import Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.kinds import WHOLES
from jlora.families.mamba import NAMES, read_mamba
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    values = common(fields, num_key_value_heads=8, norm_eps=1e-5, partial=fields.get("partial_rotary_factor", 0.5))
    attends = fields.get("attn_layer_indices", [], WHOLES)
    bias = fields.get("attention_bias", False)
    return values | {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.get("mlp_bias", False),
        "layers": tuple(Layer() if i in attends else MIXER for i in range(values["num_hidden_layers"])),
        "mamba": read_mamba(fields, values["hidden_size"]),
    }


MIXER = Layer(mixer="mamba", rope=None)
FAMILY = Family(
    model_types=("bamba",),
    class_name="BambaForCausalLM",
    read=read,
    names=NAMES,
)
