"""OLMoE: experts in every layer, and norms of all heads' queries and keys together."""

from jlora.families.family import Experts, Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.kinds import FLAG
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    fields.only("clip_qkv")
    bias = fields.get("attention_bias", False)
    values = common(fields, norm_eps=1e-5)
    return values | read_experts(fields, values) | {"qk_norm": "all", "qkv_bias": bias, "output_bias": bias}


def read_experts(fields: Fields, values: Values, *, count: int = 64, top_k: int = 8) -> Values:
    """Experts in every layer, each as wide as the MLP of `values`; the arguments are defaults."""
    experts = Experts(
        count=fields.get("num_local_experts", fields.get("num_experts", count)),
        top_k=fields.get("num_experts_per_tok", top_k),
        intermediate_size=values["intermediate_size"],
        normalize=fields.get("norm_topk_prob", False, FLAG),
    )
    return {"experts": experts, "layers": (Layer(experts=True),) * values["num_hidden_layers"]}


FAMILY = Family(
    model_types=("olmoe",),
    class_name="OlmoeForCausalLM",
    read=read,
)
