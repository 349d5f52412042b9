"""The older GPTs: GPT-2 (Radford et al. 2019) and GPT-NeoX (Black et al. 2022; Pythia)."""

from jlora.models.config import Fields, Layer, Names, read_rope
from jlora.models.families.llama import Values, sizes


def gpt2(fields: Fields) -> Values:
    """GPT-2: learned positions, biases everywhere, one fused projection."""
    fields.only("add_cross_attention", False)
    width, heads = fields.require("n_embd"), fields.require("n_head")
    head_dim, count = _head_dim(fields, width, heads), fields.require("n_layer")
    names = Names(
        stack="h",
        embedding="wte",
        positions="wpe",
        norm="ln_f",
        attention="attn",
        queries_keys_values=("c_attn",),
        output="c_proj",
        mlp_up=("c_fc",),
        mlp_down="c_proj",
        attention_norms=("ln_1", None),
        mlp_norms=("ln_2", None),
    )
    fields.get("reorder_and_upcast_attn")  # scores are float32 here in any case
    return (
        _gpt(head_dim)
        | sizes(fields, heads=heads, head_dim=head_dim, num_key_value_heads=None)
        | {
            "hidden_size": width,
            "intermediate_size": fields.get("n_inner", 4 * width),
            "num_hidden_layers": count,
            "norm_eps": fields.get("layer_norm_epsilon", 1e-5),
            "max_position_embeddings": fields.get("n_positions", 1024),
            "tie_word_embeddings": fields.get("tie_word_embeddings", True),
            "hidden_act": fields.get("activation_function", "gelu_new"),
            "attention_scale": head_dim**-0.5 if fields.get("scale_attn_weights", True) else 1.0,
            "inverse_layer_scale": fields.get("scale_attn_by_inverse_layer_idx", False),
            "names": names,
            "layers": (Layer(rope=None),) * count,
        }
    )


def gpt_neox(fields: Fields) -> Values:
    """GPT-NeoX: part of each head rotated; attention and MLP in parallel."""
    width, heads = fields.require("hidden_size"), fields.require("num_attention_heads")
    head_dim, count = _head_dim(fields, width, heads), fields.require("num_hidden_layers")
    names = Names(
        stack="gpt_neox/layers",
        embedding="gpt_neox/embed_in",
        norm="gpt_neox/final_layer_norm",
        head="embed_out",
        attention="attention",
        queries_keys_values=("query_key_value",),
        output="dense",
        mlp_up=("dense_h_to_4h",),
        mlp_down="dense_4h_to_h",
    )
    parameters = fields.rope()
    theta, partial = fields.get("rotary_emb_base", 10000.0), fields.get("rotary_pct", 0.25)
    bias = fields.get("attention_bias", True)
    return (
        _gpt(head_dim)
        | sizes(fields, heads=heads, head_dim=head_dim, num_key_value_heads=None)
        | {
            "hidden_size": width,
            "intermediate_size": fields.require("intermediate_size"),
            "num_hidden_layers": count,
            "norm_eps": fields.get("layer_norm_eps", 1e-5),
            "max_position_embeddings": fields.get("max_position_embeddings", 2048),
            "tie_word_embeddings": fields.get("tie_word_embeddings", False),
            "hidden_act": fields.get("hidden_act", "gelu"),
            "qkv_bias": bias,
            "output_bias": bias,
            "qkv_by_head": True,
            "parallel": fields.get("use_parallel_residual", True),
            "ropes": (read_rope(fields, parameters, theta=theta, head_dim=head_dim, partial=partial),),
            "names": names,
            "layers": (Layer(),) * count,
        }
    )


def _gpt(head_dim: int) -> Values:
    return {
        "norm": "layer",
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "attention_scale": head_dim**-0.5,
    }


def _head_dim(fields: Fields, width: int, heads: int) -> int:
    if width % heads:
        fields.problems.append(f"the width {width} is not a multiple of the {heads} attention heads")
    return width // heads or 1
