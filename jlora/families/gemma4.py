"""Gemma 4's text model.

Layers with a window and without differ in their heads; the last layers take the keys and values of earlier ones; each
layer may read an embedding of its own for every token, and multiplies its output by a number of its own.
"""

from collections.abc import Sequence
from typing import Any

from jlora.families import gemma2, gemma3
from jlora.families.family import OUT_IN, Beside, ExpertNames, Experts, Family, Layer, LayerInputs, Values
from jlora.families.fields import Fields
from jlora.families.gemma import read_common
from jlora.families.kinds import FLAG, LAYERS, NUMBER, OBJECT, SIZE, Kind, whole
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
                what = f"there are {len(windows)} layers" if int(number) >= len(windows) else ", ".join(unknown)
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


FAMILY = Family(
    model_types=("gemma4_text",),
    class_name="Gemma4ForCausalLM",
    read=read,
    older=None,
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
