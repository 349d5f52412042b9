"""Granite 3's mixtures: Granite with experts in every layer, which its files hold in one tensor each."""

import dataclasses

from jlora.families import granite
from jlora.families.family import OUT_IN, ExpertNames, Experts, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import ATTENTION_BIAS, ROUTED
from jlora.families.layouts import stacked_experts


def read(fields: Fields) -> Values:
    values = granite.read(fields)
    experts = Experts(
        count=fields.get("num_local_experts", 8),
        top_k=fields.get("num_experts_per_tok", 2),
        intermediate_size=values["intermediate_size"],
        normalize=True,
    )
    return values | {"experts": experts, "layers": (Layer(experts=True),) * values["num_hidden_layers"]}


READING = granite.FAMILY.gguf.reading
FAMILY = dataclasses.replace(
    granite.FAMILY,
    model_types=("granitemoe",),
    class_name="GraniteMoeForCausalLM",
    read=read,
    names=Names(router="router", mlp="block_sparse_moe"),
    checkpoint_names=(
        (r"\.experts\.gate_up_proj$", ".input_linear.weight"),
        (r"\.experts\.down_proj$", ".output_linear.weight"),
        (r"\.router\.weight$", ".router.layer.weight"),
    ),
    stacked_experts=OUT_IN,
    single_experts=ExpertNames(router="gate", gate_proj="w1", up_proj="w3", down_proj="w2"),
    gguf=granite.FAMILY.gguf._replace(
        architecture="granitemoe",
        reading=READING._replace(
            required={**READING.required, **ROUTED, "num_local_experts": "expert_count"},
            biases=ATTENTION_BIAS,
        ),
        modules={"ffn_gate_inp": "block_sparse_moe.router"},
        joined=stacked_experts("block_sparse_moe.experts"),
    ),
)
