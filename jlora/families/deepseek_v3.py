"""DeepSeek-V3 and R1, Kimi K2: latent attention, and experts chosen by sigmoids with corrections, in groups."""

import math
from typing import Any

from jlora.families.family import Experts, Family, Latent, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.kinds import EXPERTS, FLAG, LENGTH, NUMBER, SIZE, whole
from jlora.families.reading import interleaved
from jlora.families.rope import read_rope

# What config.json says if it says nothing.
DEFAULTS: dict[str, Any] = {
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
}
NAMES = Names(
    mixers=(("latent", "self_attn"),), latents=("q_a_proj", "kv_a_proj_with_mqa"), shared_expert="shared_experts"
)


def read(fields: Fields) -> Values:
    values, count = read_common(fields, DEFAULTS), fields.require("num_hidden_layers")
    dense = fields.get("first_k_dense_replace", 3, LENGTH)
    return values | {
        "ropes": read_ropes(fields, values, share=None),
        "layers": tuple(Layer(mixer="latent", experts=i >= dense) for i in range(count)),
    }


def read_common(fields: Fields, defaults: dict[str, Any]) -> Values:
    """What all families with latent attention read alike, but for layers and rotations."""
    sizes, bias = read_latent(fields, defaults), fields.get("attention_bias", False)
    heads = fields.require("num_attention_heads")
    fields.only("num_key_value_heads", heads)
    # These follow from others, and the layers that predict tokens further ahead are not read.
    fields.seen |= {"head_dim", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers"}
    return {
        "vocab_size": fields.require("vocab_size"),
        "hidden_size": fields.require("hidden_size"),
        "intermediate_size": fields.require("intermediate_size"),
        "num_hidden_layers": fields.require("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": sizes.qk_head_dim,
        "norm_eps": fields.get("rms_norm_eps", defaults["rms_norm_eps"]),
        "max_position_embeddings": fields.get("max_position_embeddings", 4096),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        "hidden_act": fields.get("hidden_act", "silu"),
        "attention_scale": sizes.qk_head_dim**-0.5 * read_mscale(fields) ** 2,
        "qkv_bias": bias,
        "output_bias": bias,
        "latent": sizes,
        "experts": read_experts(fields, defaults),
    }


def read_latent(fields: Fields, defaults: dict[str, Any]) -> Latent:
    def size(name: str) -> int:
        return fields.get(name, defaults[name], SIZE)

    queries = None if fields.config.get("q_lora_rank", 0) is None else size("q_lora_rank")
    fields.get("q_lora_rank")
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return Latent(queries, **{name: size(name) for name in names})


def read_experts(fields: Fields, defaults: dict[str, Any]) -> Experts:
    def number(name: str, least: int = 1) -> int:
        return fields.get(name, defaults[name], whole(least, EXPERTS))

    width = fields.get("moe_intermediate_size", defaults["moe_intermediate_size"], SIZE)
    count, groups = number("n_routed_experts"), number("n_group")
    if groups > 1 and (count % groups or count // groups < 2):
        fields.problems.append(f"n_routed_experts {count} cannot be divided into {groups} groups of two or more")
    return Experts(
        count=count,
        top_k=number("num_experts_per_tok"),
        intermediate_size=width,
        normalize=fields.get("norm_topk_prob", True, FLAG),
        sigmoid=True,
        correction=True,
        groups=groups,
        top_groups=min(number("topk_group"), groups),
        scaling=float(fields.get("routed_scaling_factor", defaults["routed_scaling_factor"], NUMBER)),
        shared_intermediate_size=width * number("n_shared_experts", 0),
    )


def read_mscale(fields: Fields) -> float:
    """What queries and keys are each multiplied by in scaled rotations (YaRN's mscale), besides cos and sin."""
    rope = fields.rope()
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return 1.0
    over, factor = (fields.of_kind(NUMBER, f"rotary parameter {name}", rope.get(name)) for name in SCALES)
    if not over or not factor or factor <= 1:
        return 1.0
    return 0.1 * over * math.log(factor) + 1.0


SCALES = ("mscale_all_dim", "factor")


def read_ropes(fields: Fields, values: Values, *, share: float | None) -> tuple:
    """The one rotation, of the parts of queries and keys that are rotated.

    Args:
        share: the share of these parts that is rotated, if config.json does not say; None: all, whatever it says.
    """
    theta, dim = fields.get("rope_theta", 10000.0), values["latent"].qk_rope_head_dim
    rope = read_rope(fields, fields.rope(), theta=theta, head_dim=dim, partial=share)
    turned = {"ropes": (rope,)}
    return (interleaved(turned) if fields.get("rope_interleave", True, FLAG) else turned)["ropes"]


FAMILY = Family(
    model_types=("deepseek_v3",),
    class_name="DeepseekV3ForCausalLM",
    read=read,
    names=NAMES,
    score="DeepseekV3",
    # the layer that predicts a token further ahead
    buffers=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.61\..*"),
)
