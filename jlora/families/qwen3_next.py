"""Qwen 3 Next: three gated delta nets to one gated attention, and experts beside an MLP for every token."""

from jlora.families.family import Delta, Experts, Family, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.kinds import FLAG, SIZE, WHOLES
from jlora.families.reading import common, require_length

INTERVAL = 4  # one layer in this many is attention
# What decides how fast each head forgets and how much it writes, and how much of the shared expert counts: a number for
# a head or a token, whose error meets all later tokens or the whole width, and below 1 % of a layer's weights.
SENSITIVE = (r"linear_attn/in_proj_(a|b|ba)", r"mlp/shared_expert_gate")
KINDS = {"linear_attention": "delta", "full_attention": "attention"}
NAMES = Names(mixers=(("delta", "linear_attn"),), mixer_outputs=("out_proj",))


def read(fields: Fields) -> Values:
    values = read_common(fields, fused=True)
    experts = read_experts(fields, normalize=fields.get("norm_topk_prob", True, FLAG))
    dense, step = fields.get("mlp_only_layers", [], WHOLES), fields.get("decoder_sparse_step", 1, SIZE)
    sparse = [i not in dense and experts.count > 0 and (i + 1) % step == 0 for i in range(len(values["layers"]))]
    layers = tuple(layer._replace(experts=is_sparse) for layer, is_sparse in zip(values["layers"], sparse, strict=True))
    return values | {"experts": experts, "layers": layers}


def read_common(fields: Fields, *, fused: bool) -> Values:
    """What Qwen 3 Next and 3.5 share: all but the experts."""
    values = common(fields, num_key_value_heads=2, head_dim=256, partial=fields.get("partial_rotary_factor", 0.25))
    bias = fields.get("attention_bias", False)
    return values | {
        "norm": "rms_plus_one",
        "qk_norm": "head",
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_gate": True,
        "layers": read_layers(fields, values["num_hidden_layers"]),
        "delta": read_delta(fields, fused=fused),
    }


def read_layers(fields: Fields, count: int) -> tuple[Layer, ...]:
    interval = fields.get("full_attention_interval", INTERVAL, SIZE)
    usual = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    kinds = fields.get("layer_types", usual)
    if unknown := sorted(set(kinds) - set(KINDS)):
        fields.problems.append(f"layer_types: {', '.join(unknown)} is not supported")
    require_length(fields, "layer_types", kinds, count)
    return tuple(Layer(mixer=KINDS.get(kind, "attention")) for kind in kinds)


def read_delta(fields: Fields, *, fused: bool) -> Delta:
    heads = fields.get("linear_num_key_heads", 16, SIZE), fields.get("linear_num_value_heads", 32, SIZE)
    if heads[1] % heads[0]:
        fields.problems.append(
            f"linear_num_value_heads {heads[1]} is not a multiple of linear_num_key_heads {heads[0]}"
        )
    width = fields.get("linear_conv_kernel_dim", 4, SIZE)
    if width < 2:
        fields.problems.append(f"linear_conv_kernel_dim {width} is not supported: a convolution sees 2 or more tokens")
    return Delta(
        *heads,
        key_dim=fields.get("linear_key_head_dim", 128, SIZE),
        value_dim=fields.get("linear_value_head_dim", 128, SIZE),
        conv_kernel=width,
        fused=fused,
    )


def read_experts(fields: Fields, *, normalize: bool) -> Experts:
    return Experts(
        count=fields.get("num_local_experts", fields.get("num_experts", 512)),
        top_k=fields.get("num_experts_per_tok", 10),
        intermediate_size=fields.get("moe_intermediate_size", 512, SIZE),
        normalize=normalize,
        shared_intermediate_size=fields.get("shared_expert_intermediate_size", 512, SIZE),
        shared_gate=True,
    )


FAMILY = Family(
    model_types=("qwen3_next",),
    class_name="Qwen3NextForCausalLM",
    read=read,
    names=NAMES,
    score="Qwen3Next",
    unpacked=SENSITIVE,
    buffers=(r".*\.rotary_emb\.inv_freq", r"mtp\..*"),
)
