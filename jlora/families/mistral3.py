"""Mistral Small 3.1 and later, and Ministral 3, beside their vision tower."""

from jlora.families import ministral3, mistral
from jlora.families.multimodal import LLAVA_NAMES, LLAVA_OTHERS, TextHalf, multimodal

FAMILY = multimodal(
    TextHalf(
        families=(mistral.FAMILY, ministral3.FAMILY),
        others=LLAVA_OTHERS,
        fields=(
            *("vision_config", "image_token_index", "projector_hidden_act", "vision_feature_layer"),
            *("multimodal_projector_bias", "spatial_merge_size"),
        ),
        older=LLAVA_NAMES,
    ),
    model_types=("mistral3",),
    class_name="Mistral3ForConditionalGeneration",
)
