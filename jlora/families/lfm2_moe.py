"""LFM2's mixtures: experts in all layers but the first, chosen by sigmoids with corrections."""

import dataclasses

from jlora.families import lfm2
from jlora.families.family import ExpertNames, Experts, Values
from jlora.families.fields import Fields
from jlora.families.kinds import FLAG, LENGTH, NUMBER, SIZE


def read(fields: Fields) -> Values:
    usual = ["full_attention"] * fields.require("num_hidden_layers")
    values = lfm2.read_common(fields, fields.get("layer_types", usual))
    dense = fields.get("num_dense_layers", 2, LENGTH)
    experts = Experts(
        count=fields.get("num_experts", 32),
        top_k=fields.get("num_experts_per_tok", 4),
        intermediate_size=fields.get("moe_intermediate_size", 1792, SIZE),
        normalize=fields.get("norm_topk_prob", True, FLAG),
        sigmoid=True,
        correction=fields.get("use_expert_bias", True, FLAG),
        least=1e-6,
        scaling=float(fields.get("routed_scaling_factor", 1.0, NUMBER)),
    )
    layers = tuple(layer._replace(experts=i >= dense) for i, layer in enumerate(values["layers"]))
    return values | {"experts": experts, "layers": layers}


FAMILY = dataclasses.replace(
    lfm2.FAMILY,
    gguf=None,
    model_types=("lfm2_moe",),
    class_name="Lfm2MoeForCausalLM",
    read=read,
    single_experts=ExpertNames(gate_proj="w1", up_proj="w3", down_proj="w2"),
    checkpoint_names=(
        (r"\.gate\.e_score_correction_bias$", ".expert_bias"),
        (r"(\.experts\.\d+)\.gate_proj\b", r"\1.w1"),
        (r"(\.experts\.\d+)\.up_proj\b", r"\1.w3"),
        (r"(\.experts\.\d+)\.down_proj\b", r"\1.w2"),
    ),
)
