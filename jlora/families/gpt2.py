"""GPT-2 (Radford et al. 2019): learned positions, biases everywhere, one fused projection."""

import functools

from jlora.families.family import Family, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import Config, Gguf, Metadata, Reading, require_even_heads
from jlora.families.kinds import FLAG, LAYERS, NUMBER, SIZE, TEXT, whole
from jlora.families.layouts import CONV1D
from jlora.families.reading import sizes


def read(fields: Fields) -> Values:
    fields.only("add_cross_attention", False)
    width, heads = fields.require("n_embd", SIZE), fields.require("n_head", SIZE)
    head_dim, count = read_head_dim(fields, width, heads), fields.require("n_layer", whole(1, LAYERS))
    fields.get("reorder_and_upcast_attn")  # scores are float32 here in any case
    return (
        with_biases(head_dim)
        | sizes(fields, heads=heads, head_dim=head_dim, num_key_value_heads=None)
        | {
            "hidden_size": width,
            "intermediate_size": fields.get("n_inner", 4 * width, SIZE),
            "num_hidden_layers": count,
            "norm_eps": fields.get("layer_norm_epsilon", 1e-5, NUMBER),
            "max_position_embeddings": fields.get("n_positions", 1024, SIZE),
            "tie_word_embeddings": fields.get("tie_word_embeddings", True),
            "hidden_act": fields.get("activation_function", "gelu_new", TEXT),
            "attention_scale": head_dim**-0.5 if fields.get("scale_attn_weights", True, FLAG) else 1.0,
            "inverse_layer_scale": fields.get("scale_attn_by_inverse_layer_idx", False, FLAG),
            "layers": (Layer(rope=None),) * count,
        }
    )


def with_biases(head_dim: int) -> Values:
    """What the older GPTs have in common."""
    return {
        "norm": "layer",
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "attention_scale": head_dim**-0.5,
    }


def read_head_dim(fields: Fields, width: int, heads: int) -> int:
    if width % heads:
        fields.problems.append(f"the width {width} is not a multiple of the {heads} attention heads")
    return width // heads or 1


def from_gguf(metadata: Metadata, config: Config, *, width: str, heads: str) -> Config:
    """Nothing: such files only repeat what follows from these fields of config.json."""
    metadata.only("attention.head_count_kv", config[heads])
    require_even_heads(metadata, config[width], config[heads])
    return {}


FAMILY = Family(
    model_types=("gpt2", "gpt-sw3"),
    class_name="GPT2LMHeadModel",
    read=read,
    names=Names(
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
    ),
    prefix="transformer.",
    score="GPT2",
    untransposed=True,
    buffers=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    mlx_names=((r"transformer\.", "model."),),
    gguf=Gguf(
        "gpt2",
        Reading(
            required={
                "n_embd": "embedding_length",
                "n_layer": "block_count",
                "n_head": "attention.head_count",
                "n_positions": "context_length",
                "layer_norm_epsilon": "attention.layer_norm_epsilon",
            },
            optional={"n_inner": "feed_forward_length"},
            constants={"activation_function": "gelu_new"},
            theta=None,
            more=functools.partial(from_gguf, width="n_embd", heads="n_head"),
        ),
        layouts=CONV1D,
        all_biases=True,
    ),
)
