"""Reads the sizes of Mamba-2 mixers from config.json, where their fields begin with "mamba_"."""

import math
from typing import Any

from jlora.families.family import Layer, Mamba, Names
from jlora.families.fields import Fields
from jlora.families.kinds import FLAG, SIZE, Kind
from jlora.families.reading import require_length

# Names of older files as well.
KINDS = {
    **dict.fromkeys(("mamba", "linear_attention"), "mamba"),
    **dict.fromkeys(("attention", "full_attention"), "attention"),
}
# All linears of these families are packed in four bits: the steps come from a few rows of in_proj, and a kernel is
# packed whole or not at all. Convolutions, A_log, D and dt_bias are not kernels, and are never packed.

# Bamba's and Falcon-H1's names.
NAMES = Names(
    norm="final_layernorm",
    mixers=(("mamba", "mamba"), ("parallel", None)),
    mixer_outputs=("out_proj",),
    mlp="feed_forward",
    mlp_norms=("pre_ff_layernorm", None),
)
INFINITY = {"__float__": "Infinity"}  # as transformers writes it


def _is_step(value: Any) -> bool:
    return value == INFINITY or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)


STEPS = Kind(
    "a list of two numbers from 0, or Infinity",
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_step, value)),
)
SIZE_OR_AUTO = Kind(f"{SIZE.what}, or 'auto'", lambda value: value == "auto" or SIZE.holds(value))


def read_mamba(fields: Fields, width: int) -> Mamba:
    """The mixers' sizes.

    Args:
        width: of the model.
    """
    return sizes(fields, fields.get("mamba_expand", 2, SIZE) * width)


def sizes(fields: Fields, inner: int, *, output_bias: bool | None = None, norm: str | None = "gated") -> Mamba:
    """The sizes of mixers whose heads together have `inner` values.

    Args:
        output_bias: whether the last linear has a bias; None: if the first has one.
        norm: `Mamba.norm`.
    """
    heads, groups = fields.get("mamba_n_heads", 128, SIZE), fields.get("mamba_n_groups", 1, SIZE)
    head_dim = fields.get("mamba_d_head", "auto", SIZE_OR_AUTO)
    head_dim = max(1, inner // heads) if head_dim == "auto" else head_dim
    if heads * head_dim != inner:
        fields.problems.append(
            f"mamba_n_heads {heads} × mamba_d_head {head_dim} is not {inner}, the width of the mixers"
        )
    bias = fields.get("mamba_proj_bias", False, FLAG)
    return checked(
        fields,
        Mamba(
            heads,
            head_dim,
            groups,
            state_size=fields.get("mamba_d_state", 256, SIZE),
            conv_kernel=fields.get("mamba_d_conv", 4, SIZE),
            conv_bias=fields.get("mamba_conv_bias", True, FLAG),
            bias=bias,
            output_bias=bias if output_bias is None else output_bias,
            step_limits=read_limits(fields),
            activation=fields.get("hidden_act", "silu"),
            norm=norm,
        ),
    )


def read_limits(fields: Fields) -> tuple[float, float]:
    limits = fields.get("time_step_limit", (0.0, math.inf), STEPS)
    return tuple(math.inf if limit == INFINITY else float(limit) for limit in limits)


def checked(fields: Fields, sizes: Mamba) -> Mamba:
    """The sizes; those that do not fit each other are recorded."""
    if sizes.heads % sizes.groups:
        fields.problems.append(f"{sizes.heads} Mamba heads are not a multiple of {sizes.groups} groups")
    if sizes.conv_kernel < 2:
        fields.problems.append(
            f"a Mamba convolution of {sizes.conv_kernel} token is not supported: it must see 2 or more"
        )
    return sizes


def read_layers(fields: Fields, kinds: list[str], count: int, rope: int | None) -> tuple[Layer, ...]:
    """A mixer or attention for each layer.

    Args:
        kinds: what config.json says of each.
        rope: `Layer.rope` of attention.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        fields.problems.append(f"layer_types: {', '.join(unknown)} is not supported")
    require_length(fields, "layer_types", kinds, count)
    mixers = [KINDS.get(kind, "attention") for kind in kinds]
    return tuple(Layer(mixer=mixer, rope=rope if mixer == "attention" else None) for mixer in mixers)
