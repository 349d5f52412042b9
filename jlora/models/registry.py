"""model_type → decoder block."""

from typing import Any

import flax.linen as nn

from jlora.models.config import ModelConfig
from jlora.models.llama import Block as LlamaBlock
from jlora.models.model import Model

FAMILIES: dict[str, type[nn.Module]] = {"llama": LlamaBlock}


def build(hf_config: dict[str, Any]) -> Model:
    """The model of a parsed config.json.

    Raises:
        ValueError: an unknown model_type, or fields that are missing or not supported.
    """
    model_type = hf_config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {model_type!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    return Model(ModelConfig.from_hf(hf_config), FAMILIES[model_type])
