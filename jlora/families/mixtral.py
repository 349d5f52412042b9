"""Mixtral (Jiang et al. 2024): a mixture of experts in every layer."""

from jlora.families import llama
from jlora.families.family import ExpertNames, Experts, Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.gguf import DECODER, EXPERTS, ROUTED, WINDOW, Reading
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    values = common(fields, num_key_value_heads=8, norm_eps=1e-5, rope_theta=1e6)
    experts = Experts(
        count=fields.get("num_local_experts", 8),
        top_k=fields.get("num_experts_per_tok", 2),
        intermediate_size=values["intermediate_size"],
        normalize=True,
    )
    layer = Layer(window=fields.get("sliding_window"), experts=True)
    return values | {"experts": experts, "layers": (layer,) * values["num_hidden_layers"]}


FAMILY = Family(
    model_types=("mixtral",),
    class_name="MixtralForCausalLM",
    read=read,
    score="Mixtral",
    checkpoint_names=(
        (r"\.mlp\.", ".block_sparse_moe."),
        (r"\.gate_proj\b", ".w1"),
        (r"\.up_proj\b", ".w3"),
        (r"\.down_proj\b", ".w2"),
    ),
    single_experts=ExpertNames("block_sparse_moe", gate_proj="w1", up_proj="w3", down_proj="w2"),
    gguf=llama.FAMILY.gguf._replace(
        reading=Reading(
            required={**DECODER, **ROUTED, "num_local_experts": "expert_count"}, optional=WINDOW, mark="expert_count"
        ),
        modules=EXPERTS,
    ),
)
