"""Parameter-efficient fine-tuning of language models in JAX: LoRA as a transformation of the param tree."""

from jlora import lora, quant, sharding, tree
from jlora.errors import UserError
from jlora.generate import generate
from jlora.hub import convert_adapter, load, load_adapter, load_tokenizer, save_adapter, save_model
from jlora.lora import LoraConfig
from jlora.quant import QuantConfig
from jlora.sharding import MeshConfig, make_mesh

__all__ = [
    "LoraConfig",
    "MeshConfig",
    "QuantConfig",
    "UserError",
    "convert_adapter",
    "generate",
    "load",
    "load_adapter",
    "load_tokenizer",
    "lora",
    "make_mesh",
    "quant",
    "save_adapter",
    "save_model",
    "sharding",
    "tree",
]
