"""Gemma 1, 2 and 3 (text): norms by 1 + weight, scaled embeddings, windows, soft caps."""

import math

from jlora.models.config import Fields, Layer, Names, read_rope
from jlora.models.families.llama import Values, common, read_windows

SANDWICH = Names(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


def gemma(fields: Fields) -> Values:
    """Gemma 1."""
    values = _gemma(fields, "hidden_act")
    # The first releases say "gelu" and mean the tanh approximation, as transformers takes it too.
    return values | ({"hidden_act": "gelu_pytorch_tanh"} if values["hidden_act"] == "gelu" else {})


def gemma2(fields: Fields) -> Values:
    """Gemma 2: norms before and after attention and MLP, soft caps, a window in every other layer."""
    values = _gemma(fields, "hidden_activation")
    count = values["num_hidden_layers"]
    window = fields.get("sliding_window", 4096)
    windows = read_windows(fields, window, count, lambda: [i % 2 == 0 for i in range(count)])
    return (
        values
        | _second(fields)
        | {
            "attention_softcap": _nullable(fields, "attn_logit_softcapping", 50.0),
            "final_softcap": _nullable(fields, "final_logit_softcapping", 30.0),
            "layers": tuple(Layer(window=window) for window in windows),
        }
    )


def gemma3(fields: Fields) -> Values:
    """Gemma 3's text model: five layers with a window and a rotation of their own for each without; query-key norms."""
    nested = fields.get("rope_parameters", {})
    nested = nested if {"full_attention", "sliding_attention"} & set(nested) else {}
    if wrong := sorted(name for name, value in nested.items() if not isinstance(value, dict | None)):
        fields.problems.append(f"rope_parameters: {', '.join(wrong)}: expected objects")
        nested = {}
    full = (nested.get("full_attention") or {}) | (fields.get("rope_scaling") or {})
    local = nested.get("sliding_attention") or {}
    values = _gemma(fields, "hidden_activation", own_rope=True)
    count, head_dim = values["num_hidden_layers"], values["head_dim"]

    def default() -> list[bool]:
        pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
        return [(i + 1) % pattern != 0 for i in range(count)]

    windows = read_windows(fields, fields.get("sliding_window", 4096), count, default)
    ropes = (
        read_rope(fields, full, theta=fields.get("rope_theta", 1e6), head_dim=head_dim),
        read_rope(fields, local, theta=fields.get("rope_local_base_freq", 1e4), head_dim=head_dim),
    )
    return (
        values
        | _second(fields)
        | {
            "qk_norm": "head",
            "ropes": ropes,
            "attention_softcap": fields.get("attn_logit_softcapping"),
            "final_softcap": fields.get("final_logit_softcapping"),
            "layers": tuple(Layer(window=window, rope=0 if window is None else 1) for window in windows),
        }
    )


def _gemma(fields: Fields, activation: str, *, own_rope: bool = False) -> Values:
    fields.only("use_bidirectional_attention", False)
    bias = fields.get("attention_bias", False)
    no_rope = dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta")) if own_rope else {}
    values = common(fields.replaced(**no_rope), head_dim=256, tied=True, activation=(activation, "gelu_pytorch_tanh"))
    return values | {
        "norm": "rms_plus_one",
        "qkv_bias": bias,
        "output_bias": bias,
        "embedding_scale": math.sqrt(values["hidden_size"]),
    }


def _second(fields: Fields) -> Values:
    return {
        "names": SANDWICH,
        "attention_scale": fields.get("query_pre_attn_scalar", 256) ** -0.5,
    }


def _nullable(fields: Fields, name: str, default: float) -> float | None:
    """The field's value, for fields where null means none and only absence means the default."""
    return fields.get(name, None if name in fields.config else default)
