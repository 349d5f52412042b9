"""Qwen 2, 2.5 and 3, and Qwen 3's mixtures of experts."""

from jlora.models.config import Experts, Fields, Layer
from jlora.models.families.llama import Values, common, read_windows


def qwen2(fields: Fields) -> Values:
    """Qwen 2 and 2.5: biases on queries, keys and values."""
    values = common(fields)
    return values | {"qkv_bias": True, "layers": _layers(fields, values["num_hidden_layers"])}


def qwen3(fields: Fields) -> Values:
    """Qwen 3: norms of each head's query and key instead of biases."""
    values = common(fields, head_dim=128)
    return values | _attention(fields) | {"layers": _layers(fields, values["num_hidden_layers"])}


def qwen3_moe(fields: Fields) -> Values:
    """Qwen 3 with experts in the layers that `decoder_sparse_step` and `mlp_only_layers` select."""
    values = common(fields, num_key_value_heads=4)
    count = values["num_hidden_layers"]
    dense, step = fields.get("mlp_only_layers", []), fields.get("decoder_sparse_step", 1)
    experts = Experts(
        count=fields.get("num_local_experts", fields.get("num_experts", 128)),
        top_k=fields.get("num_experts_per_tok", 8),
        intermediate_size=fields.get("moe_intermediate_size", 768),
        normalize=fields.get("norm_topk_prob", False),
    )
    window = fields.get("sliding_window") if fields.get("use_sliding_window", False) else None
    layers = tuple(
        Layer(window=window, experts=i not in dense and experts.count > 0 and (i + 1) % step == 0) for i in range(count)
    )
    return values | _attention(fields) | {"experts": experts, "layers": layers}


def _attention(fields: Fields) -> Values:
    bias = fields.get("attention_bias", False)
    return {"qk_norm": "head", "qkv_bias": bias, "output_bias": bias}


def _layers(fields: Fields, count: int) -> tuple[Layer, ...]:
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window", False) else None
    windows = read_windows(
        fields, window, count, lambda: [bool(window) and i >= fields.get("max_window_layers", 28) for i in range(count)]
    )
    return tuple(Layer(window=w) for w in windows)
