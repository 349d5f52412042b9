"""GPT-NeoX (Black et al. 2022; Pythia): part of each head rotated; attention and MLP in parallel."""

import functools

from jlora.families import gpt2
from jlora.families.family import Family, Layer, Names, Older, Values
from jlora.families.fields import Fields
from jlora.families.gguf import SIZES, Gguf, Reading
from jlora.families.kinds import FLAG, NUMBER, POSITIVE
from jlora.families.layouts import BY_KIND
from jlora.families.reading import sizes
from jlora.families.rope import read_rope


def read(fields: Fields) -> Values:
    width, heads = fields.require("hidden_size"), fields.require("num_attention_heads")
    head_dim, count = gpt2.read_head_dim(fields, width, heads), fields.require("num_hidden_layers")
    parameters = fields.rope()
    theta, partial = fields.get("rotary_emb_base", 10000.0, POSITIVE), fields.get("rotary_pct", 0.25, POSITIVE)
    bias = fields.get("attention_bias", True)
    return (
        gpt2.with_biases(head_dim)
        | sizes(fields, heads=heads, head_dim=head_dim, num_key_value_heads=None)
        | {
            "hidden_size": width,
            "intermediate_size": fields.require("intermediate_size"),
            "num_hidden_layers": count,
            "norm_eps": fields.get("layer_norm_eps", 1e-5, NUMBER),
            "max_position_embeddings": fields.get("max_position_embeddings", 2048),
            "tie_word_embeddings": fields.get("tie_word_embeddings", False),
            "hidden_act": fields.get("hidden_act", "gelu"),
            "qkv_bias": bias,
            "output_bias": bias,
            "qkv_by_head": True,
            "parallel": fields.get("use_parallel_residual", True, FLAG),
            "ropes": (read_rope(fields, parameters, theta=theta, head_dim=head_dim, partial=partial),),
            "layers": (Layer(),) * count,
        }
    )


FAMILY = Family(
    model_types=("gpt_neox",),
    class_name="GPTNeoXForCausalLM",
    read=read,
    names=Names(
        stack="gpt_neox/layers",
        embedding="gpt_neox/embed_in",
        norm="gpt_neox/final_layer_norm",
        head="embed_out",
        attention="attention",
        queries_keys_values=("query_key_value",),
        output="dense",
        mlp_up=("dense_h_to_4h",),
        mlp_down="dense_4h_to_h",
    ),
    prefix="gpt_neox.",
    score="GPTNeoX",
    buffers=(r".*\.rotary_emb\.inv_freq", r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)"),
    mlx_names=(
        (r"gpt_neox\.layers\.", "model.h."),
        (r"gpt_neox\.", "model."),
        (r"embed_out$", "model.embed_out"),
    ),
    older=Older(rotary={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}),
    gguf=Gguf(
        "gptneox",
        # The activation is Pythia's; GGUF does not say which form of GELU a model uses.
        Reading(
            required={
                **SIZES,
                "layer_norm_eps": "attention.layer_norm_epsilon",
                "use_parallel_residual": "use_parallel_residual",
            },
            constants={"hidden_act": "gelu"},
            biases={"attention_bias": "blk.0.attn_qkv.bias"},
            theta="rotary_emb_base",
            share="rotary_pct",
            more=functools.partial(gpt2.from_gguf, width="hidden_size", heads="num_attention_heads"),
        ),
        writes={"use_parallel_residual": lambda config: config.parallel},
        layouts=BY_KIND,
        all_biases=True,
        own_head=True,
    ),
)
