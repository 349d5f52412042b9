"""Falcon-H1: attention and Mamba-2 side by side in every layer, with factors of nearly everything."""

from jlora.errors import number_of
from jlora.families import mamba
from jlora.families.family import Family, Layer, Scales, Values
from jlora.families.fields import Fields
from jlora.families.kinds import FLAG, NUMBER, NUMBERS, POSITIVE, SIZE
from jlora.families.reading import common, nullable


def read(fields: Fields) -> Values:
    values = common(fields, num_key_value_heads=8, norm_eps=1e-5)
    bias = fields.get("attention_bias", False)
    return values | {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.get("mlp_bias", False),
        "layers": (Layer(mixer="parallel"),) * values["num_hidden_layers"],
        "mamba": read_mamba(fields, values["hidden_size"]),
        "embedding_scale": float(fields.get("embedding_multiplier", 1.0, NUMBER)),
        "logits_divisor": 1 / fields.get("lm_head_multiplier", 1.0, POSITIVE),
        "attention_scale": values["attention_scale"] * fields.get("key_multiplier", 1.0, NUMBER),
        "scales": read_scales(fields),
    }


def read_mamba(fields: Fields, width: int) -> mamba.Mamba:
    inner = nullable(fields, "mamba_d_ssm", 1024, SIZE)
    expanded = fields.get("mamba_expand", 2, SIZE) * width
    normed, first = fields.get("mamba_rms_norm", False, FLAG), fields.get("mamba_norm_before_gate", True, FLAG)
    norm = ("ungated" if first else "gated") if normed else None
    output_bias = bool(fields.get("projectors_bias", False, FLAG))
    return mamba.sizes(fields, expanded if inner is None else inner, output_bias=output_bias, norm=norm)


def read_scales(fields: Fields) -> Scales:
    mlp = fields.get("mlp_multipliers", [1.0] * 2, NUMBERS)
    projected = fields.get("ssm_multipliers", [1.0] * 5, NUMBERS)
    for name, found, count in (("mlp_multipliers", mlp, 2), ("ssm_multipliers", projected, 5)):
        if len(found) != count:
            fields.problems.append(f"{name} has {number_of(len(found), 'value')}, expected {count}")
    gate, mlp_out = (*mlp, 1.0, 1.0)[:2]
    return Scales(
        attention_in=fields.get("attention_in_multiplier", 1.0, NUMBER),
        attention_out=fields.get("attention_out_multiplier", 1.0, NUMBER),
        mamba_in=fields.get("ssm_in_multiplier", 1.0, NUMBER),
        mamba_out=fields.get("ssm_out_multiplier", 1.0, NUMBER),
        projected=tuple(projected),
        gate=gate,
        mlp_out=mlp_out,
    )


FAMILY = Family(
    model_types=("falcon_h1",),
    class_name="FalconH1ForCausalLM",
    read=read,
    names=mamba.NAMES,
    refused=("out_proj",),
)
