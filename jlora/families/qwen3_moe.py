"""Qwen 3 with experts in the layers that `decoder_sparse_step` and `mlp_only_layers` select."""

from jlora.families.family import Experts, Family, Layer, Older, Values
from jlora.families.fields import Fields
from jlora.families.gguf import ATTENTION_BIAS, DECODER, EXPERTS, QK_NORMS, ROUTED, SILU, Gguf, Reading
from jlora.families.kinds import FLAG, SIZE, WHOLES
from jlora.families.qwen3 import read_attention
from jlora.families.reading import common


def read(fields: Fields) -> Values:
    values = common(fields, num_key_value_heads=4)
    count = values["num_hidden_layers"]
    dense, step = fields.get("mlp_only_layers", [], WHOLES), fields.get("decoder_sparse_step", 1, SIZE)
    experts = Experts(
        count=fields.get("num_local_experts", fields.get("num_experts", 128)),
        top_k=fields.get("num_experts_per_tok", 8),
        intermediate_size=fields.get("moe_intermediate_size", 768, SIZE),
        normalize=fields.get("norm_topk_prob", False, FLAG),
    )
    window = fields.get("sliding_window") if fields.get("use_sliding_window", False) else None
    layers = tuple(
        Layer(window=window, experts=i not in dense and experts.count > 0 and (i + 1) % step == 0) for i in range(count)
    )
    return values | read_attention(fields) | {"experts": experts, "layers": layers}


FAMILY = Family(
    model_types=("qwen3_moe",),
    class_name="Qwen3MoeForCausalLM",
    read=read,
    score="Qwen3Moe",
    older=Older(renamed={"num_local_experts": "num_experts"}),
    gguf=Gguf(
        "qwen3moe",
        Reading(
            required={
                **DECODER,
                **ROUTED,
                "num_experts": "expert_count",
                "moe_intermediate_size": "expert_feed_forward_length",
            },
            constants={**SILU, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
            biases=ATTENTION_BIAS,
        ),
        writes={"expert_feed_forward_length": lambda config: config.experts.intermediate_size},
        modules=QK_NORMS | EXPERTS,
    ),
)
