"""Qwen 1.5's and 2's mixtures: Qwen 2 with experts, beside an MLP with a gate of its own for every token."""

from jlora.families.family import Experts, Family, Values
from jlora.families.fields import Fields
from jlora.families.kinds import FLAG, LARGEST, SIZE, WHOLES, whole
from jlora.families.reading import common, read_windows


def read(fields: Fields) -> Values:
    values = common(fields, num_key_value_heads=16)
    count = values["num_hidden_layers"]
    experts = Experts(
        count=fields.get("num_local_experts", fields.get("num_experts", 60)),
        top_k=fields.get("num_experts_per_tok", 4),
        intermediate_size=fields.get("moe_intermediate_size", 1408, SIZE),
        normalize=fields.get("norm_topk_prob", False, FLAG),
        shared_intermediate_size=fields.get("shared_expert_intermediate_size", 5632, SIZE),
        shared_gate=True,
    )
    dense, step = fields.get("mlp_only_layers", [], WHOLES), fields.get("decoder_sparse_step", 1, SIZE)
    window = fields.get("sliding_window", 4096) if fields.get("use_sliding_window", False) else None
    last = fields.get("max_window_layers", 28, whole(-LARGEST, LARGEST)) if window else 0
    fields.seen.add("max_window_layers")  # read only if there is a window

    def default() -> list[bool]:  # every second layer, unlike the dense models'
        return [i % 2 == 0 and i < last for i in range(count)]

    layers = tuple(
        layer._replace(window=window, experts=i not in dense and experts.count > 0 and (i + 1) % step == 0)
        for i, (layer, window) in enumerate(
            zip(values["layers"], read_windows(fields, window, count, default), strict=False)
        )
    )
    return values | {"qkv_bias": fields.get("qkv_bias", True, FLAG), "experts": experts, "layers": layers}


FAMILY = Family(
    model_types=("qwen2_moe",),
    class_name="Qwen2MoeForCausalLM",
    read=read,
    score="Qwen2Moe",
    unpacked=(r"mlp/shared_expert_gate",),
)
