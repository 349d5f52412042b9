"""Helium: Llama that rotates neighbouring values of a head together."""

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.reading import common, interleaved


def read(fields: Fields) -> Values:
    values = common(fields, num_key_value_heads=20, head_dim=128, norm_eps=1e-8, rope_theta=1e5)
    return interleaved(values) | {
        "norm": "rms_wide",
        "qkv_bias": fields.get("attention_bias", False),
        "mlp_bias": fields.get("mlp_bias", False),
    }


FAMILY = Family(model_types=("helium",), class_name="HeliumForCausalLM", read=read, score="Helium")
