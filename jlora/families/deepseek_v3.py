"""DeepSeek-V3 and R1, Kimi K2: latent attention, and experts chosen by sigmoids with corrections, in groups."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlora.families.family import Experts, Family, Latent, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import DECODER, ROUTED, SILU, Config, Gguf, Metadata, Reading
from jlora.families.gguf import EXPERTS as EXPERT_MODULES
from jlora.families.kinds import EXPERTS, FLAG, LENGTH, NUMBER, SIZE, whole
from jlora.families.layouts import Joined, Sizes
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


# ---------------------------------------------------------------- GGUF

SIGMOID = 2  # llama.cpp's number of how scores become weights
OVER = "rope.scaling.yarn_log_multiplier"


def from_gguf(metadata: Metadata, config: Config) -> Config:
    metadata.only("expert_gating_func", SIGMOID)
    if metadata.get("expert_gating_func") is None and metadata.number("vocab_size") != GLM_VOCAB:
        metadata.problems.append(f"no metadata {metadata.name('expert_gating_func')}: the scores would be a softmax")
    return read_sizes(metadata, config)


GLM_VOCAB = 154880  # by which llama.cpp knows GLM 4.7 Flash, whose files do not say


def read_sizes(metadata: Metadata, config: Config) -> Config:
    """The sizes of latent attention, which llama.cpp computes with one head of keys, and of the experts."""
    rank, rotated = metadata.require("attention.kv_lora_rank"), metadata.require("rope.dimension_count")
    keys, values = (metadata.require(f"attention.{part}_length_mla") for part in ("key", "value"))
    metadata.only("attention.head_count_kv", 1)
    metadata.only("attention.key_length", rank + rotated)
    metadata.only("attention.value_length", rank)
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": rotated,
        "kv_lora_rank": rank,
        "q_lora_rank": metadata.number("attention.q_lora_rank") or None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": values,
        "n_shared_experts": metadata.number("expert_shared_count", 0),
        "first_k_dense_replace": metadata.number("leading_dense_block_count", 0),
        "n_group": metadata.number("expert_group_count") or 1,
        "topk_group": metadata.number("expert_group_used_count") or 1,
        "routed_scaling_factor": float(metadata.number("expert_weights_scale") or 1.0),
        "norm_topk_prob": bool(metadata.number("expert_weights_norm", False)),
    }


def scaling(metadata: Metadata) -> Config:
    """YaRN's `mscale_all_dim`, of which the file has a tenth; llama.cpp takes `mscale` for the same number."""
    over = metadata.get(OVER)
    if not over:
        metadata.problems.append(f"no metadata {metadata.name(OVER)}: llama.cpp scales scores as no model does")
        return {}
    over = round(10 * over, 6)
    return {"mscale": over, "mscale_all_dim": over}


def _log_multiplier(config: Any) -> float | None:
    rope = config.ropes[0]
    if rope.rope_type != "yarn" or rope.factor <= 1:
        return None
    mscale = math.sqrt(config.attention_scale * math.sqrt(config.latent.qk_head_dim))
    return (mscale - 1) / math.log(rope.factor)


def _split(values: Any, sizes: Sizes) -> tuple[Any, ...]:
    """What makes keys [H, R, …] and values [H, …, R] of the latents, of rows head by head."""
    heads = values.reshape(sizes.queries, -1, values.shape[-1])
    keys = sizes.latent.qk_nope_head_dim
    return heads[:, :keys].swapaxes(1, 2), heads[:, keys:]


def _join(parts: Sequence[Any], sizes: Sizes) -> Any:
    keys, values = parts
    heads = keys.__array_namespace__().concat([keys.swapaxes(1, 2), values], axis=1)
    return heads.reshape(-1, heads.shape[-1])


WRITES: Mapping[str, Callable[[Any], Any]] = {
    "attention.head_count_kv": lambda config: 1,
    "attention.key_length": lambda config: config.latent.kv_lora_rank + config.latent.qk_rope_head_dim,
    "attention.value_length": lambda config: config.latent.kv_lora_rank,
    "attention.key_length_mla": lambda config: config.latent.qk_head_dim,
    "attention.value_length_mla": lambda config: config.latent.v_head_dim,
    "attention.q_lora_rank": lambda config: config.latent.q_lora_rank or 0,  # llama.cpp needs it
    "attention.kv_lora_rank": lambda config: config.latent.kv_lora_rank,
    "expert_feed_forward_length": lambda config: config.experts.intermediate_size,
    "expert_shared_count": lambda config: config.experts.shared_intermediate_size // config.experts.intermediate_size,
    "expert_weights_scale": lambda config: config.experts.scaling,
    "expert_weights_norm": lambda config: config.experts.normalize or None,
    "expert_gating_func": lambda config: SIGMOID if config.experts.sigmoid else 1,
    "expert_group_count": lambda config: config.experts.groups if config.experts.groups > 1 else None,
    "expert_group_used_count": lambda config: config.experts.top_groups if config.experts.groups > 1 else None,
    "leading_dense_block_count": lambda config: next(
        (i for i, layer in enumerate(config.layers) if layer.experts), len(config.layers)
    ),
    OVER: _log_multiplier,
    "rope.scaling.attn_factor": lambda config: None,
}
READING = Reading(
    required={
        **DECODER,
        **ROUTED,
        "n_routed_experts": "expert_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    },
    constants={**SILU, "attention_bias": False, "rope_interleave": True},
    more=from_gguf,
    scaling=scaling,
)
GGUF = Gguf(
    "deepseek2",
    READING,
    writes=WRITES,
    modules={
        **EXPERT_MODULES,
        **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
        **{f"attn_q_{part}": f"self_attn.q_{part}_proj" for part in ("a", "b")},
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    },
    joined=(
        Joined("self_attn.kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), _join, _split, rows=False),
        Joined("mlp.gate.e_score_correction_bias", ("exp_probs_b.bias",)),
    ),
    unadapted=r"attn_(q|q_a|q_b|kv_a_mqa)",
)

FAMILY = Family(
    model_types=("deepseek_v3",),
    class_name="DeepseekV3ForCausalLM",
    read=read,
    names=NAMES,
    score="DeepseekV3",
    # the layer that predicts a token further ahead
    buffers=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.61\..*"),
    gguf=GGUF,
)
