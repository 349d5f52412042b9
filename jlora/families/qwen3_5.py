"""Qwen 3.5, alone or with its vision tower: Qwen 3 Next's layers without experts, its fused linears taken apart."""

from jlora.families.family import Family, Values
from jlora.families.fields import Fields
from jlora.families.multimodal import TextHalf, multimodal
from jlora.families.qwen3_next import NAMES, SENSITIVE, read_common


def read(fields: Fields) -> Values:
    return read_common(fields, fused=False)


FAMILY = Family(
    model_types=("qwen3_5_text",),
    class_name="Qwen3_5ForCausalLM",
    read=read,
    names=NAMES,
    score="Qwen3_5Text",
    unpacked=SENSITIVE,
    buffers=(r".*\.rotary_emb\.inv_freq", r"mtp\..*"),
)

# The tower, and the layer that predicts further tokens, which transformers leaves out too.
OTHERS = r"(model\.)?visual\..+|mtp\..+"
ONLY_SEEING = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
MULTIMODAL = (
    multimodal(
        TextHalf(families=(FAMILY,), others=OTHERS, fields=ONLY_SEEING, tied=False),
        model_types=("qwen3_5",),
        class_name="Qwen3_5ForConditionalGeneration",
        score="Qwen3_5",
    ),
)
