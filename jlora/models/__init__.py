"""Language models from their Hugging Face config: one small file a family, one `Model` that runs them."""

from jlora.models.attention import Cache
from jlora.models.config import ModelConfig
from jlora.models.model import Model
from jlora.models.registry import FAMILIES, build

__all__ = ["FAMILIES", "Cache", "Model", "ModelConfig", "build"]
