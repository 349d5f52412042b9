"""Language models from their Hugging Face config: families are data, and one decoder computes them all."""

from jlora.families import FAMILIES
from jlora.models.cache import Cache
from jlora.models.config import ModelConfig
from jlora.models.model import Model
from jlora.models.registry import build

__all__ = ["FAMILIES", "Cache", "Model", "ModelConfig", "build"]
