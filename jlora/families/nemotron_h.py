"""Nemotron-H and Nemotron 3: layers of one part each, a Mamba-2 mixer, attention, an MLP or a mixture of experts."""

import math
from typing import Any

from jlora.families import mamba
from jlora.families.family import Experts, Family, Layer, Mamba, Names, Values
from jlora.families.fields import Fields
from jlora.families.kinds import EXPERTS, FLAG, NUMBER, SIZE, TEXT, Kind, list_of, whole
from jlora.families.reading import common

# The letter of hybrid_override_pattern, and the names of layers_block_type, of older files too → the layer.
LAYERS = {
    **dict.fromkeys(("M", "mamba", "linear_attention"), Layer(mixer="mamba", rope=None, mlp=False)),
    **dict.fromkeys(("*", "attention", "full_attention"), Layer(rope=None, mlp=False)),
    **dict.fromkeys(("-", "mlp"), Layer(mixer="none", rope=None)),
    **dict.fromkeys(("E", "moe"), Layer(mixer="none", rope=None, experts=True)),
}
# What transformers reads, and computes nothing with.
IDLE = ("time_step_limit", "time_step_max", "time_step_floor", "chunk_size", "expand", "n_shared_experts")
IDLE += ("moe_shared_expert_overlap", "num_nextn_predict_layers", "mtp_layers_block_type")
USUAL = ["linear_attention", "moe", "full_attention", "mlp"]


def read(fields: Fields) -> Values:
    layers = read_layers(fields)
    eps, activation = fields.get("layer_norm_epsilon", 1e-5, NUMBER), fields.get("mlp_hidden_act", "relu2", TEXT)
    values = common(
        fields.replaced(
            num_hidden_layers=len(layers),
            rms_norm_eps=eps,
            hidden_act=activation,
            intermediate_size=fields.get("intermediate_size", 21504),
            max_position_embeddings=fields.get("max_position_embeddings", 4096),
        ),
        num_key_value_heads=8,
        head_dim=128,
    )
    # transformers computes without these.
    for name in ("attention_bias", "tie_word_embeddings", "mamba_proj_bias"):
        fields.only(name, False)
    fields.only("sliding_window")
    for name in IDLE:
        fields.get(name)
    return values | {
        "gated": False,
        "norm": "rms_wide",
        "mlp_bias": fields.get("mlp_bias", False),
        "ropes": (),
        "layers": layers,
        "experts": read_experts(fields) if any(layer.experts for layer in layers) else None,
        "mamba": read_mamba(fields),
    }


def read_layers(fields: Fields) -> tuple[Layer, ...]:
    pattern = fields.get("hybrid_override_pattern", None, TEXT)
    usual = USUAL if pattern is None else list(pattern)
    named = fields.get("layers_block_type", fields.get("layer_types", usual), list_of(TEXT, "texts"))
    if unknown := sorted(set(named) - set(LAYERS)):
        fields.problems.append(f"layers_block_type: {', '.join(unknown)} is not supported")
    return tuple(LAYERS.get(kind, Layer()) for kind in named)


def read_mamba(fields: Fields) -> Mamba:
    def value(name: str, older: str, default: Any, kind: Kind) -> Any:
        return fields.get(older, fields.get(name, default, kind), kind)

    bias = fields.get("use_bias", False, FLAG)
    return mamba.checked(
        fields,
        Mamba(
            heads=fields.get("mamba_num_heads", 128, SIZE),
            head_dim=fields.get("mamba_head_dim", 64, SIZE),
            groups=value("n_groups", "mamba_n_groups", 8, SIZE),
            state_size=fields.get("ssm_state_size", 128, SIZE),
            conv_kernel=value("conv_kernel", "mamba_d_conv", 4, SIZE),
            conv_bias=value("use_conv_bias", "mamba_conv_bias", True, FLAG),
            bias=bias,
            output_bias=bias,
            # transformers takes this for the shortest step, and none of time_step_limit.
            step_limits=(float(value("time_step_min", "mamba_dt_min", 0.001, NUMBER)), math.inf),
            activation=fields.get("mamba_hidden_act", "silu", TEXT),
        ),
    )


def read_experts(fields: Fields) -> Experts:
    def number(name: str, default: int) -> int:
        return fields.get(name, default, whole(1, EXPERTS))

    count = fields.get("num_local_experts", number("n_routed_experts", 8))
    groups = number("n_group", 1)
    if groups > 1 and (count % groups or count // groups < 2):
        fields.problems.append(f"n_routed_experts {count} cannot be divided into {groups} groups of two or more")
    return Experts(
        count=count,
        top_k=number("num_experts_per_tok", 2),
        intermediate_size=fields.get("moe_intermediate_size", 7688, SIZE),
        normalize=fields.get("norm_topk_prob", True, FLAG),
        shared_intermediate_size=fields.get("moe_shared_expert_intermediate_size", 7688, SIZE),
        sigmoid=True,
        correction=True,
        groups=groups,
        top_groups=min(number("topk_group", 1), groups),
        scaling=float(fields.get("routed_scaling_factor", 1.0, NUMBER)),
        latent_size=fields.get("moe_latent_size", 0, SIZE),
    )


FAMILY = Family(
    model_types=("nemotron_h",),
    class_name="NemotronHForCausalLM",
    read=read,
    names=Names(
        embedding="embeddings",
        norm="norm_f",
        attention="mixer",
        mixer_outputs=("out_proj",),
        mlp="mixer",
        mlp_up=("up_proj",),
        attention_norms=("norm", None),
        mlp_norms=("norm", None),
        shared_expert="shared_experts",
    ),
    checkpoint_names=((r"^model\.", "backbone."),),
    refused=("out_proj",),
    buffers=(r"mtp\..*",),
)
