"""Mistral Small 3.1 to 4, and Ministral 3, beside their vision tower."""

import dataclasses

from jlora.families import ministral3, mistral, mistral4
from jlora.families.multimodal import LLAVA_NAMES, LLAVA_OTHERS, TextHalf, multimodal

HALF = TextHalf(
    families=(mistral.FAMILY, ministral3.FAMILY, mistral4.FAMILY),
    others=LLAVA_OTHERS,
    fields=(
        *("vision_config", "image_token_index", "projector_hidden_act", "vision_feature_layer"),
        *("multimodal_projector_bias", "spatial_merge_size"),
    ),
    older=LLAVA_NAMES,
)
FAMILY = dataclasses.replace(
    multimodal(HALF, model_types=("mistral3",), class_name="Mistral3ForConditionalGeneration"),
    # Mistral 4's names are the others' too, with some for what these do not have.
    names=mistral4.FAMILY.names.below(HALF.module),
    stacked_experts=mistral4.FAMILY.stacked_experts,
)
