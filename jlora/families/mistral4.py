"""Mistral 4's language model: latent attention with queries that grow, and experts chosen by a softmax, in groups."""

import dataclasses
from typing import Any

from jlora.families import deepseek_v3
from jlora.families.family import OUT_IN, Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.gguf import Config, Metadata
from jlora.families.kinds import LENGTH, ROTARY
from jlora.families.layouts import Joined, stacked_experts
from jlora.families.ministral3 import BETA, GROWTH, read_growth

DEFAULTS: dict[str, Any] = {
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 256,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-6,
}
# What transformers takes if config.json says nothing about rotary positions.
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    BETA: 0.1,
}
SHARE = "partial_rotary_factor"


def read(fields: Fields) -> Values:
    parameters = dict(fields.rope() or ROPE)
    share = fields.of_kind(ROTARY[SHARE], f"rotary parameter {SHARE}", parameters.pop(SHARE, None))
    fields = fields.replaced(rope_parameters=parameters, rope_scaling=None)
    values, dense = deepseek_v3.read_common(fields, DEFAULTS), fields.get("first_k_dense_replace", 0, LENGTH)
    sizes, ropes = values["latent"], deepseek_v3.read_ropes(fields, values, share=None)
    # The share is of whole heads, of which the part that is rotated has a width of its own in config.json.
    if share is not None and int(sizes.qk_head_dim * share) != sizes.qk_rope_head_dim:
        fields.problems.append(
            f"{SHARE} {share} of {sizes.qk_head_dim} is not qk_rope_head_dim {sizes.qk_rope_head_dim}"
        )
    return values | {
        "ropes": ropes,
        "query_growth": read_growth(fields, parameters, ropes[0]),
        "experts": dataclasses.replace(values["experts"], sigmoid=False, correction=False),
        "layers": tuple(Layer(mixer="latent", experts=i >= dense) for i in range(values["num_hidden_layers"])),
    }


# ---------------------------------------------------------------- GGUF


def from_gguf(metadata: Metadata, config: Config) -> Config:
    metadata.only("expert_gating_func", 1)
    metadata.only("attention.temperature_length", metadata.get("rope.scaling.original_context_length"))
    return deepseek_v3.read_sizes(metadata, config)


def scaling(metadata: Metadata) -> Config:
    """Only for DeepSeek's files does llama.cpp take `mscale` for another number than 1."""
    metadata.only(deepseek_v3.OVER, 0.1)
    beta = metadata.get(GROWTH)
    return deepseek_v3.scaling(metadata) | ({BETA: beta} if beta else {})


READING = deepseek_v3.READING
GGUF = deepseek_v3.GGUF._replace(
    architecture="mistral4",
    reading=READING._replace(
        constants={**READING.constants, "rope_parameters": {"rope_type": "default"}}, more=from_gguf, scaling=scaling
    ),
    writes={
        **deepseek_v3.WRITES,
        GROWTH: lambda config: config.query_growth.beta if config.query_growth else None,
        "attention.temperature_length": lambda config: config.query_growth.length if config.query_growth else None,
    },
    joined=(
        deepseek_v3.GGUF.joined[0],
        Joined("mlp.experts.gate_up_proj", ("ffn_gate_up_exps.weight",)),
        *stacked_experts("mlp.experts"),
    ),
)

FAMILY = Family(
    model_types=("mistral4",),
    class_name="Mistral4ForCausalLM",
    read=read,
    names=deepseek_v3.NAMES,
    score="Mistral4",
    stacked_experts=OUT_IN,
    older=None,
    gguf=GGUF,
)
