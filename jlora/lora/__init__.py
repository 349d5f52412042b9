"""LoRA as a transformation of a param tree: adapters beside kernels, a frozen half and a trainable half."""

from jlora.lora.config import LoraConfig
from jlora.lora.linear import linear
from jlora.lora.merge import merge
from jlora.lora.partition import SETTINGS, combine, is_adapter, labels, split, strip
from jlora.lora.setup import init

__all__ = ["SETTINGS", "LoraConfig", "combine", "init", "is_adapter", "labels", "linear", "merge", "split", "strip"]
