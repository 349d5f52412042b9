"""Muse Glimmer beside its vision tower: gated attention, norms without weights, layers without positions (NoPE)."""

from jlora.families import gemma2
from jlora.families.family import Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.kinds import NUMBER, NUMBERS, POSITIVE
from jlora.families.multimodal import TextHalf, multimodal
from jlora.families.reading import common, read_windows, require_length

PERIOD = 4  # one layer in this many, counted from the last, sees all tokens and rotates nothing
# What transformers takes if config.json says nothing.
DEFAULTS = {
    "vocab_size": 202_048,
    "hidden_size": 6656,
    "intermediate_size": 19_968,
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 200_001,
}


def read(fields: Fields) -> Values:
    values = common(fields, num_key_value_heads=2, norm_eps=1e-5, activation=("hidden_activation", "silu"))
    count, bias = values["num_hidden_layers"], fields.get("attention_bias", False)
    whole = [(count - 1 - i) % PERIOD == 0 for i in range(count)]
    windows = read_windows(fields, fields.get("sliding_window", 2048), count, lambda: [not each for each in whole])
    turned = read_turned(fields, values["ropes"][0].rope_theta, whole)
    return values | {
        "norm": "rms_plus_one",
        "final_norm": "rms_wide",
        "post_norm_eps": float(fields.get("post_norm_eps", 1e-8, NUMBER)),
        "qk_norm": "bare",
        "embedding_norm": True,
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_gate": True,
        "attention_scale": values["attention_scale"] * fields.get("qk_scale_factor", 3.87, NUMBER),
        "logits_divisor": 1 / fields.get("output_multiplier", 0.19611613513818404, POSITIVE),
        "final_softcap": fields.get("final_logit_softcapping", 20.0, POSITIVE),
        "layers": tuple(Layer(window=w, rope=0 if turns else None) for w, turns in zip(windows, turned, strict=False)),
    }


def read_turned(fields: Fields, theta: float, whole: list[bool]) -> list[bool]:
    """Whether each layer rotates queries and keys.

    Args:
        theta: the rotary base of those that do.
        whole: which layers do not if config.json does not say.
    """
    bases = fields.get("layer_rope_theta", [0 if each else theta for each in whole], NUMBERS)
    require_length(fields, "layer_rope_theta", bases, len(whole))
    if other := sorted({base for base in bases if base not in (0, theta)}):
        fields.problems.append(
            f"layer_rope_theta: {', '.join(map(str, other))} is not supported (supported: 0, and the {theta} of "
            "rope_parameters)"
        )
    return [base != 0 for base in bases]


TEXT = Family(
    model_types=("muse_glimmer_text",),
    class_name="MuseGlimmerTextModel",
    read=read,
    names=gemma2.NAMES._replace(output_gate="gate_proj"),
)
FAMILY = multimodal(
    TextHalf(
        families=(TEXT,),
        others=r"(model\.)?(vision_tower|vision_adapter|vision_projection)\..+",
        fields=(
            *("vision_config", "image_token_id", "video_token_id", "out_hidden_size", "projector_hidden_size"),
            "projector_hidden_act",
        ),
        defaults=DEFAULTS,
        tied=False,
    ),
    model_types=("muse_glimmer",),
    class_name="MuseGlimmerForConditionalGeneration",
)
