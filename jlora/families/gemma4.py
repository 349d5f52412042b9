"""Gemma 4's text model.

Layers with a window and without differ in their heads; the last layers take the keys and values of earlier ones; each
layer may read an embedding of its own for every token, and multiplies its output by a number of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlora.errors import number_of
from jlora.families import gemma2, gemma3
from jlora.families.family import OUT_IN, Beside, ExpertNames, Experts, Family, Layer, LayerInputs, Values
from jlora.families.fields import Fields
from jlora.families.gemma import read_common
from jlora.families.gguf import DECODER, QK_NORMS, Config, Gguf, Metadata, Reading
from jlora.families.kinds import FLAG, LAYERS, NUMBER, OBJECT, SIZE, Kind, whole
from jlora.families.layouts import Joined, stacked_experts
from jlora.families.multimodal import TextHalf, multimodal
from jlora.families.reading import read_windows
from jlora.families.rope import read_rope

FULL, SLIDING = "full_attention", "sliding_attention"
FULL_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
COUNT = whole(0, LAYERS)
SIZES = {"head_dim", "num_key_value_heads"}
LAYER_CONFIG = Kind(
    "an object of objects by the layers' numbers",
    lambda value: OBJECT.holds(value) and all(key.isdecimal() and OBJECT.holds(own) for key, own in value.items()),
)


def read(fields: Fields) -> Values:
    if fields.get("use_bidirectional_attention") == "vision":  # only tokens of images see later ones
        fields = fields.replaced(use_bidirectional_attention=None)
    full, local = fields.ropes()
    values = read_common(fields, "hidden_activation", own_rope=True)
    count, heads = values["num_hidden_layers"], values["num_attention_heads"]
    found = read_windows(
        fields, fields.get("sliding_window", 512), count, lambda: [(i + 1) % gemma3.PERIOD != 0 for i in range(count)]
    )
    windows = [*found[:-1], None]  # transformers makes the last layer one without a window, whatever the file says
    sizes = _sizes(fields, windows)
    for layer, own in enumerate(sizes):
        keys = own.get("num_key_value_heads", values["num_key_value_heads"])
        if heads % keys:
            fields.problems.append(f"layer {layer}: num_attention_heads {heads} is not a multiple of {keys} key heads")
    width = next((own["head_dim"] for own in sizes if "head_dim" in own), values["head_dim"])
    experts = _experts(fields)
    own_input = fields.get("hidden_size_per_layer_input", 256, COUNT)
    own_rows = fields.get("vocab_size_per_layer_input", 262144, SIZE) if own_input else 0
    if own_input and own_rows < values["vocab_size"]:
        fields.problems.append(
            f"vocab_size_per_layer_input {own_rows}: layers have no input of their own for the other tokens of "
            f"vocab_size {values['vocab_size']}"
        )
    layers = [
        Layer(window=window, rope=0 if window is None else 1, experts=experts is not None, **own)
        for window, own in zip(windows, sizes, strict=True)
    ]
    return values | {
        "norm": "rms_wide",
        "qk_norm": "head",
        "value_norm": True,
        "attention_scale": 1.0,
        "final_softcap": fields.get("final_logit_softcapping", kind=NUMBER),
        "layer_scalar": True,
        "experts": experts,
        "hidden_size_per_layer_input": own_input,
        "vocab_size_per_layer_input": own_rows,
        "ropes": (
            read_rope(fields, full or FULL_ROPE, theta=1e6, head_dim=width),
            read_rope(fields, local, theta=gemma3.LOCAL_THETA, head_dim=values["head_dim"]),
        ),
        "layers": tuple(_shared(fields, layers, values["intermediate_size"])),
    }


def _experts(fields: Fields) -> Experts | None:
    if not fields.get("enable_moe_block", False, FLAG):
        return None
    return Experts(
        count=fields.require("num_experts", SIZE),
        top_k=fields.require("top_k_experts", SIZE),
        intermediate_size=fields.require("moe_intermediate_size", SIZE),
        normalize=True,
        beside=Beside("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
        scaled=True,
    )


def _sizes(fields: Fields, windows: Sequence[int | None]) -> list[dict[str, Any]]:
    """The sizes in which each layer differs from what config.json says of all.

    transformers writes them as `per_layer_config`, whose keys are the layers' numbers; without it, the layers without a
    window have sizes of their own.
    """
    same = fields.get("attention_k_eq_v", False, FLAG)
    head_dim, keys = fields.get("global_head_dim", 512, SIZE), fields.get("num_global_key_value_heads", kind=SIZE)
    full = {"head_dim": head_dim} | ({"num_key_value_heads": keys} if same and keys else {})
    sizes = [full if window is None else {} for window in windows]
    if (own := fields.get("per_layer_config", kind=LAYER_CONFIG)) is not None:
        sizes = [{} for _ in windows]
        for number, values in own.items():
            where = f"per_layer_config: {number}"
            if int(number) >= len(windows) or (unknown := sorted(values.keys() - SIZES)):
                what = (
                    f"found {number_of(len(windows), 'layer')}" if int(number) >= len(windows) else ", ".join(unknown)
                )
                fields.problems.append(f"{where}: {what}: not supported")
                continue
            sizes[int(number)] = {
                name: found
                for name, value in values.items()
                if (found := fields.of_kind(SIZE, f"{where}: {name}", value)) is not None
            }
    return [
        own | ({"keys_as_values": True} if same and w is None else {}) for own, w in zip(sizes, windows, strict=True)
    ]


def _shared(fields: Fields, layers: Sequence[Layer], width: int) -> list[Layer]:
    """The layers, of which the last take keys and values from the last one before them with the same kind of window."""
    first = len(layers) - fields.get("num_kv_shared_layers", 0, COUNT)
    wide = fields.get("use_double_wide_mlp", False, FLAG)
    kinds = [FULL if layer.window is None else SLIDING for layer in layers]
    if first >= len(layers):
        return list(layers)
    if first < 1 or (lacking := set(kinds) - set(kinds[:first])):
        what = "every layer" if first < 1 else ", ".join(sorted(lacking))
        fields.problems.append(f"num_kv_shared_layers: no layer before the shared ones has keys and values for {what}")
        return list(layers)
    keepers = {max(i for i in range(first) if kinds[i] == kind): kind for kind in set(kinds[first:])}
    return [
        layer._replace(keeps=keepers.get(i))
        if i < first
        else layer._replace(shares=kind, intermediate_size=2 * width if wide else None, keys_as_values=False)
        for i, (layer, kind) in enumerate(zip(layers, kinds, strict=True))
    ]


# ---------------------------------------------------------------- GGUF


def from_gguf(metadata: Metadata, config: Config) -> Config:
    """What differs between layers with a window and without, and all that only some of these models have."""
    count = config["num_hidden_layers"]
    sliding = _each(metadata, "attention.sliding_window_pattern", count)
    full_dim, local_dim = (metadata.require(f"attention.key_length{kind}") for kind in ("", "_swa"))
    for part, kind, dim in (("value", "", full_dim), ("value", "_swa", local_dim)):
        metadata.only(f"attention.{part}_length{kind}", dim)
    for kind, dim in (("", full_dim), ("_swa", local_dim)):
        metadata.only(f"rope.dimension_count{kind}", dim)
    keys, widths = (_each(metadata, key, count) for key in ("attention.head_count_kv", "feed_forward_length"))
    shared = metadata.number("attention.shared_kv_layers", 0)
    first = count - shared
    same = any(
        f"blk.{i}.attn_k.weight" in metadata.tensors and f"blk.{i}.attn_v.weight" not in metadata.tensors
        for i in range(first)
    )
    if len(set(widths[:first])) > 1 or len(set(widths[first:])) > 1:
        metadata.problems.append(f"{metadata.name('feed_forward_length')} differs from layer to layer: {widths}")
    if shared and (first < 2 or sliding[first - 2 : first] != [True, False]):
        metadata.problems.append(
            f"{metadata.name('attention.shared_kv_layers')} is {shared}; llama.cpp then expects a window in layer "
            f"{first - 2} and none in layer {first - 1}"
        )
    found = {
        # llama.cpp caps logits by this if the file says nothing, and by nothing if it says 0.
        "final_logit_softcapping": metadata.get("final_logit_softcapping", 30.0) or None,
        "head_dim": local_dim,
        "global_head_dim": full_dim,
        "num_key_value_heads": next((n for n, slides in zip(keys, sliding, strict=True) if slides), keys[0]),
        "num_global_key_value_heads": next((n for n, slides in zip(keys, sliding, strict=True) if not slides), None),
        "attention_k_eq_v": same,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": bool(shared) and widths[-1] == 2 * widths[0],
        "num_kv_shared_layers": shared,
        "sliding_window": metadata.require("attention.sliding_window"),
        "layer_types": [SLIDING if slides else FULL for slides in sliding],
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": metadata.share_of_frequencies(),
                "rope_theta": metadata.get("rope.freq_base", 1e6),
            },
            SLIDING: {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", gemma3.LOCAL_THETA)},
        },
    }
    return found | _own_inputs(metadata) | _experts_in_gguf(metadata)


def _each(metadata: Metadata, key: str, count: int) -> list[Any]:
    """A value for every layer."""
    found = metadata.get(key)
    if found is None or (isinstance(found, list) and len(found) != count):
        what = (
            "is missing" if found is None else f"has {number_of(len(found), 'value')} for {number_of(count, 'layer')}"
        )
        metadata.problems.append(f"{metadata.name(key)} {what}")
        return [1] * count
    return found if isinstance(found, list) else [found] * count


def _own_inputs(metadata: Metadata) -> Config:
    width = metadata.number("embedding_length_per_layer_input", 0)
    rows = metadata.tensors.get("per_layer_token_embd.weight", (0,))[0]
    return {"hidden_size_per_layer_input": width} | ({"vocab_size_per_layer_input": rows} if width else {})


def _experts_in_gguf(metadata: Metadata) -> Config:
    count, keys = metadata.number("expert_count", 0), ("expert_used_count", "expert_feed_forward_length")
    if not count:
        return {"enable_moe_block": False}
    top_k, width = (metadata.require(key) for key in keys)
    return {"enable_moe_block": True, "num_experts": count, "top_k_experts": top_k, "moe_intermediate_size": width}


def _in_full(name: str) -> Callable[[Any], Any]:
    """Of the layers without a window."""
    return lambda config: next(
        (getattr(config.heads(layer), name) for layer in config.layers if layer.window is None),
        getattr(config.heads(config.layers[0]), name),
    )


def _feed_forward(config: Any) -> Any:
    widths = [layer.intermediate_size or config.intermediate_size for layer in config.layers]
    return widths if len(set(widths)) > 1 else config.intermediate_size


WRITES: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), _in_full("width")),
    **dict.fromkeys(
        ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"),
        lambda config: config.head_dim,
    ),
    "attention.head_count_kv": lambda config: [config.heads(layer).keys for layer in config.layers],
    "attention.sliding_window_pattern": lambda config: [layer.window is not None for layer in config.layers],
    "attention.shared_kv_layers": lambda config: sum(layer.shares is not None for layer in config.layers),
    "embedding_length_per_layer_input": lambda config: config.hidden_size_per_layer_input,
    "feed_forward_length": _feed_forward,
    "final_logit_softcapping": lambda config: config.final_softcap or 0.0,
    "expert_feed_forward_length": lambda config: config.experts.intermediate_size if config.experts else None,
}
GGUF = Gguf(
    "gemma4",
    Reading(
        required={name: key for name, key in DECODER.items() if name != "intermediate_size"},
        constants=gemma2.GELU,
        more=from_gguf,
        theta=None,
    ),
    writes=WRITES,
    modules={
        **QK_NORMS,
        **{f"post_ffw_norm_{i}": f"post_feedforward_layernorm_{i}" for i in (1, 2)},
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
        "ffn_gate_inp": "router.proj",
    },
    joined=(
        Joined("layer_scalar", ("layer_output_scale.weight",)),
        Joined("router.scale", ("ffn_gate_inp.scale",)),
        Joined("router.per_expert_scale", ("ffn_down_exps.scale",)),
        Joined("experts.gate_up_proj", ("ffn_gate_up_exps.weight",)),
        *stacked_experts("experts"),
    ),
    period=gemma3.PERIOD,
    unadapted=r"per_layer_.*",
)
FAMILY = Family(
    model_types=("gemma4_text",),
    class_name="Gemma4ForCausalLM",
    read=read,
    older=None,
    gguf=GGUF,
    names=gemma2.NAMES._replace(layer_inputs=LayerInputs(), router="router"),
    stacked_experts=OUT_IN,
    single_experts=ExpertNames("moe"),
    unpacked=(r"router/proj",),  # it decides for whole experts, and is small
    # Some files have keys and values also for layers that take those of others.
    spare=(r".*\.self_attn\.(k|v)_(proj|norm)\.weight",),
)

PERCEIVING = (
    *("vision_config", "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id"),
    *("boa_token_id", "eoa_token_index", "audio_token_id"),
)
MULTIMODAL = (
    multimodal(
        TextHalf(
            families=(FAMILY,),
            others=r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\..+",
            fields=PERCEIVING,
        ),
        model_types=("gemma4",),
        class_name="Gemma4ForConditionalGeneration",
    ),
)
