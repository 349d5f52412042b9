"""GLM 4.7 Flash: DeepSeek-V3 with sizes of its own, and a list of which layers have experts."""

from typing import Any

from jlora.families import deepseek_v3
from jlora.families.family import Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.kinds import TEXT, list_of
from jlora.families.reading import require_length

DEFAULTS: dict[str, Any] = {
    "moe_intermediate_size": 1536,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
}


def read(fields: Fields) -> Values:
    values, count = deepseek_v3.read_common(fields, DEFAULTS), fields.require("num_hidden_layers")
    kinds = fields.get("mlp_layer_types", ["dense"] + ["sparse"] * (count - 1), list_of(TEXT, "texts"))
    if unknown := sorted(set(kinds) - {"dense", "sparse"}):
        fields.problems.append(f"mlp_layer_types: {', '.join(unknown)} is not supported")
    require_length(fields, "mlp_layer_types", kinds, count)
    return values | {
        "ropes": deepseek_v3.read_ropes(fields, values, share=1.0),
        "layers": tuple(Layer(mixer="latent", experts=kind == "sparse") for kind in kinds),
    }


FAMILY = Family(
    model_types=("glm4_moe_lite",),
    class_name="Glm4MoeLiteForCausalLM",
    read=read,
    names=deepseek_v3.NAMES,
    # the layer that predicts a token further ahead
    buffers=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.47\..*"),
    gguf=deepseek_v3.GGUF._replace(reading=None),
)
