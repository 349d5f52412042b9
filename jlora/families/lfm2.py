"""LFM2: gated short convolutions, with attention in a few layers."""

from collections.abc import Callable, Mapping
from typing import Any

from jlora.families.family import Family, Layer, Names, Values
from jlora.families.fields import Fields
from jlora.families.gguf import SIZES, Config, Gguf, Metadata, Reading
from jlora.families.kinds import FLAG, NUMBER, POSITIVE, SIZE, WHOLES
from jlora.families.layouts import Joined
from jlora.families.reading import common, require_length

KINDS = {"conv": "conv", "full_attention": "attention"}


def read(fields: Fields) -> Values:
    count = fields.require("num_hidden_layers")
    attends = fields.get("full_attn_idxs", list(range(count)), WHOLES)
    kinds = fields.get("layer_types", ["full_attention" if i in attends else "conv" for i in range(count)])
    return read_common(fields.replaced(intermediate_size=read_width(fields)), kinds)


def read_common(fields: Fields, kinds: list[str]) -> Values:
    """What LFM2 reads with experts and without.

    Args:
        kinds: what mixes tokens in each layer, a key of KINDS.
    """
    tied = fields.get("tie_embedding", True, FLAG)
    values, width = common(fields, rope_theta=1e6, tied=tied), fields.get("conv_L_cache", 3, SIZE)
    if width < 2:
        fields.problems.append(f"conv_L_cache {width} is not supported: a convolution sees 2 or more tokens")
    if unknown := sorted(set(kinds) - set(KINDS)):
        fields.problems.append(f"layer_types: {', '.join(unknown)} is not supported")
    require_length(fields, "layer_types", kinds, values["num_hidden_layers"])
    return values | {
        "norm_eps": fields.get("norm_eps", 1e-5, NUMBER),
        "qk_norm": "head",
        "conv_kernel": width,
        "conv_bias": fields.get("conv_bias", False, FLAG),
        "layers": tuple(Layer(mixer=KINDS.get(kind, "attention")) for kind in kinds),
    }


def read_width(fields: Fields) -> int:
    """The MLP's width, which config.json gives before it is cut by a third and rounded up."""
    width = fields.get("block_ff_dim", fields.get("intermediate_size", 12288), SIZE)
    multiple, factor = fields.get("block_multiple_of", 256, SIZE), fields.get("block_ffn_dim_multiplier", 1.0, POSITIVE)
    if not fields.get("block_auto_adjust_ff_dim", True, FLAG):
        return width
    return -(-int(factor * int(2 * width / 3)) // multiple) * multiple


# ---------------------------------------------------------------- GGUF


def from_gguf(metadata: Metadata, config: Config) -> Config:
    """The layers' kinds: those with convolutions have no heads of keys."""
    heads, count = metadata.get("attention.head_count_kv"), config["num_hidden_layers"]
    keys = heads if isinstance(heads, list) else [heads] * count
    attending = {own for own in keys if own}
    if len(keys) != count or len(attending) > 1:
        metadata.problems.append(
            f"{metadata.name('attention.head_count_kv')} is {heads}; expected 0 or one number each"
        )
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        metadata.only(key, head_dim)
    return {
        "num_key_value_heads": next(iter(attending), config["num_attention_heads"]),
        "layer_types": ["full_attention" if own else "conv" for own in keys],
    }


WRITES: Mapping[str, Callable[[Any], Any]] = {
    "attention.head_count_kv": lambda config: [
        0 if layer.mixer == "conv" else config.num_key_value_heads for layer in config.layers
    ],
    "shortconv.l_cache": lambda config: config.conv_kernel,
}
GGUF = Gguf(
    "lfm2",
    Reading(
        required={**SIZES, "norm_eps": "attention.layer_norm_rms_epsilon", "conv_L_cache": "shortconv.l_cache"},
        # The file has the width that is computed with.
        constants={"conv_bias": False, "block_auto_adjust_ff_dim": False},
        more=from_gguf,
    ),
    writes=WRITES,
    modules={
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
    },
    joined=(
        Joined(
            "conv.conv.weight",
            ("shortconv.conv.weight",),
            lambda parts, sizes: parts[0][:, None],
            lambda values, sizes: (values[:, 0],),
            rows=False,
        ),
    ),
    norm="token_embd_norm",
)

FAMILY = Family(
    model_types=("lfm2",),
    class_name="Lfm2ForCausalLM",
    read=read,
    names=Names(
        norm="embedding_norm",
        mixers=(("conv", "conv"),),
        output="out_proj",
        mixer_outputs=("out_proj",),
        qk_norms=("q_layernorm", "k_layernorm"),
        mlp="feed_forward",
        mlp_up=("w1", "w3"),
        mlp_down="w2",
        attention_norms=("operator_norm", None),
        mlp_norms=("ffn_norm", None),
    ),
    gguf=GGUF,
)
