"""Reading and writing Hub files: checkpoints, tokenizers, GGUF and PEFT adapters."""

from jlora.hub.adapters import load_adapter
from jlora.hub.checkpoints.folder import refuse_inputs, require_own
from jlora.hub.checkpoints.mxfp4 import can_hold as can_hold_packed_experts
from jlora.hub.checkpoints.packed import save_quantized
from jlora.hub.checkpoints.reading import (
    checkpoint_dtype,
    describe,
    describe_model,
    exact_dtype,
    float_dtype,
    load,
    read_model,
)
from jlora.hub.checkpoints.source import Source, open_source
from jlora.hub.checkpoints.writing import require_writable, save_model
from jlora.hub.gguf.mixtures import FILE_TYPES as GGUF_TYPES
from jlora.hub.gguf.modelfile import require_modelfile, save_modelfile
from jlora.hub.gguf.writing import require_gguf, save_gguf, save_gguf_adapter
from jlora.hub.peft.conversion import convert_adapter
from jlora.hub.peft.writing import save_adapter, scales_note
from jlora.hub.recipes.merging import merge_models
from jlora.hub.tokenizer import load_tokenizer, say_unused_tokenizer, tokenizer_differences
from jlora.names import ExpertLayout

__all__ = [
    "GGUF_TYPES",
    "ExpertLayout",
    "Source",
    "can_hold_packed_experts",
    "checkpoint_dtype",
    "convert_adapter",
    "describe",
    "describe_model",
    "exact_dtype",
    "float_dtype",
    "load",
    "load_adapter",
    "load_tokenizer",
    "merge_models",
    "open_source",
    "read_model",
    "refuse_inputs",
    "require_gguf",
    "require_modelfile",
    "require_own",
    "require_writable",
    "save_adapter",
    "save_gguf",
    "save_gguf_adapter",
    "save_model",
    "save_modelfile",
    "save_quantized",
    "say_unused_tokenizer",
    "scales_note",
    "tokenizer_differences",
]
