"""Gemma 3, alone or with a vision tower: layers with a window and a rotation of their own, every sixth without."""

from jlora.families import gemma2
from jlora.families.family import Family, Layer, Values
from jlora.families.fields import Fields
from jlora.families.gemma import read_common
from jlora.families.gguf import QK_NORMS, SOFT_CAPS, Config, Gguf, Metadata, Reading
from jlora.families.kinds import NUMBER, POSITIVE, SIZE
from jlora.families.layouts import PLUS_ONE
from jlora.families.multimodal import LLAVA_NAMES, LLAVA_OTHERS, TextHalf, multimodal
from jlora.families.reading import read_windows
from jlora.families.rope import read_rope

PERIOD = 6  # layers
LOCAL_THETA = 10000.0


def read(fields: Fields) -> Values:
    full, local = fields.ropes()
    values = read_common(fields, "hidden_activation", own_rope=True)
    count, head_dim = values["num_hidden_layers"], values["head_dim"]

    def default() -> list[bool]:
        pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", PERIOD, SIZE), SIZE)
        return [(i + 1) % pattern != 0 for i in range(count)]

    windows = read_windows(fields, fields.get("sliding_window", 4096), count, default)
    ropes = (
        read_rope(fields, full, theta=fields.get("rope_theta", 1e6), head_dim=head_dim),
        read_rope(fields, local, theta=fields.get("rope_local_base_freq", LOCAL_THETA, POSITIVE), head_dim=head_dim),
    )
    return values | {
        "attention_scale": gemma2.read_scale(fields),
        "qk_norm": "head",
        "ropes": ropes,
        "attention_softcap": fields.get("attn_logit_softcapping", kind=NUMBER),
        "final_softcap": fields.get("final_logit_softcapping", kind=NUMBER),
        "layers": tuple(Layer(window=window, rope=0 if window is None else 1) for window in windows),
    }


def from_gguf(metadata: Metadata, config: Config) -> Config:
    local = metadata.get("rope.freq_base_swa", LOCAL_THETA)
    found = gemma2.from_gguf(metadata, config, window=None, period=PERIOD, largest=62)
    return found | {"rope_local_base_freq": local}


FAMILY = Family(
    model_types=("gemma3_text",),
    class_name="Gemma3ForCausalLM",
    read=read,
    names=gemma2.NAMES,
    score="Gemma3Text",
    gguf=Gguf(
        "gemma3",
        Reading(optional=SOFT_CAPS, constants=gemma2.GELU, more=from_gguf),
        modules=QK_NORMS,
        layouts=PLUS_ONE,
        period=PERIOD,
        soft_caps=False,
    ),
)

MULTIMODAL = (
    multimodal(
        TextHalf(
            families=(FAMILY,),
            others=LLAVA_OTHERS,
            fields=("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
            defaults={
                "vocab_size": 262_208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "max_position_embeddings": 131_072,
                "bos_token_id": 2,
                "eos_token_id": 1,
                "pad_token_id": 0,
            },
            older=LLAVA_NAMES,
        ),
        model_types=("gemma3",),
        class_name="Gemma3ForConditionalGeneration",
        score="Gemma3",
    ),
)
