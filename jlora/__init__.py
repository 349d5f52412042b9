"""Parameter-efficient fine-tuning of language models in JAX: LoRA as a transformation of the param tree."""

from jlora import lora, quant
from jlora.lora import LoraConfig
from jlora.quant import QuantConfig

__all__ = ["LoraConfig", "QuantConfig", "lora", "quant"]
