"""Qwen 3 Next: three gated delta nets to one gated attention, and experts beside an MLP for every token."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlora.families.family import Delta, Experts, Family, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import DECODER, EXPERTS, QK_NORMS, ROUTED, SILU, Config, Gguf, Metadata, Reading
from jlora.families.kinds import FLAG, SIZE, WHOLES
from jlora.families.layouts import SUM, Joined, Sizes
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


# ---------------------------------------------------------------- GGUF

# config.json's name → GGUF's.
DELTA_SIZES = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
EXPERT_SIZES = {
    **ROUTED,
    "num_experts": "expert_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
SHARE = "partial_rotary_factor"


def from_gguf(metadata: Metadata, config: Config) -> Config:
    """The heads of both kinds of layers, and which layers are which."""
    head_dim = metadata.require("attention.key_length")
    metadata.only("attention.value_length", head_dim)
    # llama.cpp takes the width of a key for that of a value too.
    metadata.only("ssm.inner_size", config["linear_num_value_heads"] * config["linear_key_head_dim"])
    interval, count = metadata.number("full_attention_interval", INTERVAL), config["num_hidden_layers"]
    usual = [bool((i + 1) % interval) for i in range(count)]
    recurrent = metadata.get("attention.recurrent_layers", usual)
    return {
        "head_dim": head_dim,
        "num_key_value_heads": metadata.number("attention.head_count_kv", config["num_attention_heads"]),
        "linear_value_head_dim": config["linear_key_head_dim"],
        "layer_types": ["linear_attention" if own else "full_attention" for own in recurrent[:count]],
    }


def _interval(config: Any) -> int | None:
    """The number of layers of which one is attention; None if there is none."""
    attends = [layer.mixer == "attention" for layer in config.layers]
    return next(
        (n for n in range(1, len(attends) + 1) if attends == [(i + 1) % n == 0 for i in range(len(attends))]), None
    )


WRITES: Mapping[str, Callable[[Any], Any]] = {
    "ssm.conv_kernel": lambda config: config.delta.conv_kernel,
    "ssm.state_size": lambda config: config.delta.key_dim,
    "ssm.group_count": lambda config: config.delta.key_heads,
    "ssm.time_step_rank": lambda config: config.delta.value_heads,
    "ssm.inner_size": lambda config: config.delta.value_heads * config.delta.value_dim,
    "full_attention_interval": _interval,
    "attention.recurrent_layers": lambda config: [layer.mixer == "delta" for layer in config.layers],
}
WRITES_EXPERTS: Mapping[str, Callable[[Any], Any]] = {
    "expert_feed_forward_length": lambda config: config.experts.intermediate_size,
    "expert_shared_feed_forward_length": lambda config: config.experts.shared_intermediate_size,
}
MODULES: Mapping[str, str | None] = {
    **QK_NORMS,
    "ffn_norm": None,
    "post_attention_norm": "post_attention_layernorm",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
SHARED = {f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
# All norms multiply by 1 + weight, and the file holds that sum, but for the delta nets' own.
NORMS = ((r"(?!.*ssm_norm).*norm\.weight", SUM),)
# Some files have the one row of the shared expert's gate as a vector.
SHARED_GATE = Joined(
    "mlp.shared_expert_gate.weight",
    ("ffn_gate_inp_shexp.weight",),
    join=lambda parts, sizes: parts[0].reshape(1, -1),
)


def recurrence(sort: Callable[[Any, Sizes], Any], unsort: Callable[[Any, Sizes], Any]) -> tuple[Joined, ...]:
    """A delta net's parameters other than its linears' kernels.

    Args:
        sort, unsort: from the Hub's order of value heads, or of the convolution's channels, to GGUF's, and back.
    """

    def decays(values: Any) -> Any:
        return -values.__array_namespace__().exp(values)

    def logarithms(values: Any) -> Any:
        return values.__array_namespace__().log(-values)

    def own(name: str, part: str, there: Callable[[Any], Any], back: Callable[[Any], Any]) -> Joined:
        return Joined(
            f"linear_attn.{name}",
            (part,),
            lambda parts, sizes: unsort(back(parts[0]), sizes),
            lambda values, sizes: (there(sort(values, sizes)),),
            rows=False,
        )

    def same(values: Any) -> Any:
        return values

    return (
        own("A_log", "ssm_a", decays, logarithms),
        own("dt_bias", "ssm_dt.bias", same, same),
        own("conv1d.weight", "ssm_conv1d.weight", lambda x: x[:, 0], lambda x: x[:, None]),
    )


def _in_place(values: Any, sizes: Sizes) -> Any:
    return values


def _widths(delta: Delta) -> tuple[int, ...]:
    """The rows of one key head, its values and its gates in the fused linear."""
    values = delta.value_heads // delta.key_heads * delta.value_dim
    return delta.key_dim, delta.key_dim, values, values


def _by_kind(values: Any, sizes: Sizes) -> tuple[Any, ...]:
    """From key head by key head to (all queries, keys and values; all gates)."""
    xp, delta = values.__array_namespace__(), sizes.delta
    heads, start, parts = values.reshape(delta.key_heads, -1, *values.shape[1:]), 0, []
    for width in _widths(delta):
        parts.append(heads[:, start : start + width].reshape(-1, *values.shape[1:]))
        start += width
    return xp.concat(parts[:3]), parts[3]


def _by_head(parts: Sequence[Any], sizes: Sizes) -> Any:
    xp, delta, start, heads = parts[0].__array_namespace__(), sizes.delta, 0, []
    mixed = xp.concat(list(parts))
    for width in _widths(delta):
        rows = delta.key_heads * width
        heads.append(mixed[start : start + rows].reshape(delta.key_heads, width, *mixed.shape[1:]))
        start += rows
    return xp.concat(heads, axis=1).reshape(mixed.shape)


FAMILY = Family(
    model_types=("qwen3_next",),
    class_name="Qwen3NextForCausalLM",
    read=read,
    names=NAMES,
    score="Qwen3Next",
    unpacked=SENSITIVE,
    buffers=(r".*\.rotary_emb\.inv_freq", r"mtp\..*"),
    gguf=Gguf(
        "qwen3next",
        Reading(
            required={**DECODER, **DELTA_SIZES, **EXPERT_SIZES},
            constants={**SILU, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
            more=from_gguf,
            share=SHARE,
        ),
        writes={**WRITES, **WRITES_EXPERTS},
        modules={**MODULES, **EXPERTS, **SHARED, "ssm_ba": "linear_attn.in_proj_ba"},
        layouts=NORMS,
        joined=(
            Joined("linear_attn.in_proj_qkvz.weight", ("attn_qkv.weight", "attn_gate.weight"), _by_head, _by_kind),
            SHARED_GATE,
            *recurrence(_in_place, _in_place),
        ),
    ),
)
