"""Llama (Touvron et al. 2023) and families that differ from it in a field or two: Mistral, SmolLM3, OLMo 2, Granite,
Phi-3.
"""

from collections.abc import Callable
from typing import Any

from jlora.models.config import Experts, Fields, Layer, Names, read_rope

Values = dict[str, Any]


def llama(fields: Fields) -> Values:
    """Llama 1 to 3.3."""
    bias = fields.get("attention_bias", False)
    return common(fields) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": fields.get("mlp_bias", False),
    }


def internlm3(fields: Fields) -> Values:
    """InternLM 3, which transformers computes as Llama."""
    attention = fields.get("attention_bias", fields.get("qkv_bias", False))
    mlp = fields.get("mlp_bias", fields.get("bias", False))
    if attention != mlp:
        fields.problems.append(f"qkv_bias {attention} with bias {mlp} is not supported (nor by transformers)")
    values = common(fields, num_key_value_heads=2, head_dim=128, norm_eps=1e-5)
    return values | {"qkv_bias": attention, "output_bias": attention, "mlp_bias": mlp}


def iquestcoder(fields: Fields) -> Values:
    """IQuest-Coder, which transformers computes as Llama."""
    fields.only("clip_qkv")
    fields.only("use_sliding_window", False)
    return llama(fields) | common(fields, num_key_value_heads=8, head_dim=128, norm_eps=1e-5)


def mistral(fields: Fields) -> Values:
    """Mistral: a window in every layer, unless `sliding_window` is null (as since v0.2)."""
    fields.only("layer_types")
    values = common(fields, num_key_value_heads=8)
    return values | {"layers": (Layer(window=fields.get("sliding_window")),) * values["num_hidden_layers"]}


def smollm3(fields: Fields) -> Values:
    """SmolLM3: some layers without positions (NoPE, Kazemnejad et al. 2023)."""
    values = llama(fields) | common(fields, num_key_value_heads=4, rope_theta=2e6, tied=True)
    count = values["num_hidden_layers"]
    rotated = fields.get("no_rope_layers")
    if rotated is None:
        interval = fields.get("no_rope_layer_interval", 4)
        rotated = [(i + 1) % interval != 0 for i in range(count)]
    rotated = rotated[:count]  # transformers ignores the rest of a longer list
    _require_length(fields, "no_rope_layers", rotated, count)
    window = fields.get("sliding_window") if fields.get("use_sliding_window", False) else None
    windows = read_windows(fields, window, count, lambda: [window is not None and not turn for turn in rotated])
    layers = tuple(Layer(window=w, rope=0 if turn else None) for w, turn in zip(windows, rotated, strict=False))
    return values | {"layers": layers}


def olmo2(fields: Fields) -> Values:
    """OLMo 2: norms after attention and MLP, and query-key norms."""
    names = Names(attention_norms=(None, "post_attention_layernorm"), mlp_norms=(None, "post_feedforward_layernorm"))
    bias = fields.get("attention_bias", False)
    values = common(fields, norm_eps=1e-5)
    return values | {"names": names, "norm": "rms_wide", "qk_norm": "all", "qkv_bias": bias, "output_bias": bias}


def granite(fields: Fields) -> Values:
    """Granite 3: Llama with four factors."""
    return llama(fields) | {
        "embedding_scale": float(fields.get("embedding_multiplier", 1.0)),
        "residual_scale": float(fields.get("residual_multiplier", 1.0)),
        "logits_divisor": float(fields.get("logits_scaling", 1.0)),
        "attention_scale": float(fields.get("attention_multiplier", 1.0)),
    }


def phi3(fields: Fields) -> Values:
    """Phi-3, Phi-3.5 and Phi-4: fused projections, part of each head rotated, LongRoPE."""
    rope = fields.rope()
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # older names of longrope
        fields = fields.replaced(rope_scaling=rope | {"rope_type": "longrope"})
    # transformers' class has an original length of its own, which it prefers to that of the rotary parameters.
    fields = fields.replaced(
        original_max_position_embeddings=fields.get("original_max_position_embeddings", 4096),
    )
    values = common(fields, norm_eps=1e-5, partial=fields.get("partial_rotary_factor", 1.0))
    names = Names(queries_keys_values=("qkv_proj",), mlp_up=("gate_up_proj",))
    return values | {
        "names": names,
        "layers": (Layer(window=fields.get("sliding_window")),) * values["num_hidden_layers"],
    }


def mixtral(fields: Fields) -> Values:
    """Mixtral (Jiang et al. 2024)."""
    values = common(fields, num_key_value_heads=8, norm_eps=1e-5, rope_theta=1e6)
    experts = Experts(
        count=fields.get("num_local_experts", 8),
        top_k=fields.get("num_experts_per_tok", 2),
        intermediate_size=values["intermediate_size"],
        normalize=True,
    )
    layer = Layer(window=fields.get("sliding_window"), experts=True)
    return values | {"experts": experts, "layers": (layer,) * values["num_hidden_layers"]}


def common(
    fields: Fields,
    *,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
    partial: float | None = None,
    tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> Values:
    """The values that nearly all families read alike; the arguments are the defaults of their transformers configs."""
    width, heads = fields.require("hidden_size"), fields.require("num_attention_heads")
    if fields.get("head_dim", head_dim) is None and width % heads:
        fields.problems.append(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and head_dim is not given"
        )
    head_dim = fields.get("head_dim", head_dim or width // heads or 1)
    values = sizes(fields, heads=heads, head_dim=head_dim, num_key_value_heads=num_key_value_heads)
    rope = fields.rope()
    theta = fields.get("rope_theta", rope_theta)
    return values | {
        "hidden_size": width,
        "intermediate_size": fields.require("intermediate_size"),
        "num_hidden_layers": fields.require("num_hidden_layers"),
        "norm_eps": fields.get("rms_norm_eps", norm_eps),
        "max_position_embeddings": fields.get("max_position_embeddings", 2048),
        "tie_word_embeddings": fields.get("tie_word_embeddings", tied),
        "hidden_act": fields.get(*activation),
        "attention_scale": head_dim**-0.5,
        "ropes": (read_rope(fields, rope, theta=theta, head_dim=head_dim, partial=partial),),
        "layers": (Layer(),) * fields.require("num_hidden_layers"),
    }


def sizes(fields: Fields, *, heads: int, head_dim: int, num_key_value_heads: int | None) -> Values:
    """The sizes of vocabulary and heads, checked."""
    groups = fields.get("num_key_value_heads", num_key_value_heads or heads)
    if heads % groups:
        fields.problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    return {
        "vocab_size": fields.require("vocab_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


def read_windows(fields: Fields, window: int | None, count: int, default: Callable[[], list[bool]]) -> list[int | None]:
    """The window of every layer, by `layer_types`.

    Args:
        default: which layers have a window if `layer_types` is absent.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        return [window if has else None for has in default()]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        fields.problems.append(f"layer_types: {', '.join(unknown)} is not supported")
    _require_length(fields, "layer_types", kinds, count)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _require_length(fields: Fields, name: str, values: list, count: int) -> None:
    if len(values) != count:
        fields.problems.append(f"{name} has {len(values)} entries for {count} layers")
