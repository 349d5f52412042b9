"""The ways in which a checkpoint may be packed: a table by config.json's `quant_method`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import UserError
from jlora.hub.checkpoints import bitsandbytes, mxfp4
from jlora.hub.checkpoints.source import Source
from jlora.hub.checkpoints.stored import Stored
from jlora.hub.checkpoints.weights import SafetensorsFolder, TensorInfo
from jlora.quant import PackedArray, QuantConfig


class Method(NamedTuple):
    """One way.

    Attributes:
        formats: those of `jlora.quant.FORMATS` that it has.
        find: (folder, the tensors of its files) → name → tensor, for every packed one.
        read: (a packed tensor, the dequantised values' dtype) → the kernel.
        write: (the weight's name, the kernel) → tensors.
        said: (quantization_config) → how the checkpoint is packed.
        partly: whether it is meant for some kernels only, so that the others may be packed in another way.
    """

    formats: tuple[str, ...]
    find: Callable[[Path, Mapping[str, TensorInfo]], dict[str, Stored]]
    read: Callable[[Stored, np.dtype], PackedArray]
    write: Callable[[str, Any], dict[str, np.ndarray]]
    said: Callable[[Mapping[str, Any]], QuantConfig]
    partly: bool = False


METHODS = {
    "bitsandbytes": Method(
        tuple(bitsandbytes.FORMATS),
        bitsandbytes.stored_tensors,
        bitsandbytes.read_packed,
        bitsandbytes.packed_tensors,
        bitsandbytes.said_quant,
    ),
    mxfp4.METHOD: Method(
        ("mxfp4",), mxfp4.stored_tensors, mxfp4.read_packed, mxfp4.packed_tensors, mxfp4.said_quant, partly=True
    ),
}
BY_FORMAT = {format: method for method in METHODS.values() for format in method.formats}


def said_quant(config: Mapping[str, Any]) -> QuantConfig | None:
    """How a checkpoint is packed according to its config.json; None if it is not.

    Raises:
        UserError: it is quantised in a way that jlora does not read.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    name = _method(settings)
    if name not in METHODS:
        raise UserError(
            f"config.json says that the weights are quantised ({name}), which jlora does not read; "
            "give the original model, and model.quant"
        )
    return METHODS[name].said(settings)


def stored_tensors(source: str | Path, checkpoint: Source, quant: QuantConfig | None) -> dict[str, Stored]:
    """Name → tensor, for those that are already packed.

    Raises:
        UserError: they are packed in a way that jlora does not read, or one of which `quant` cannot pack the rest.
    """
    if not isinstance(checkpoint, SafetensorsFolder):
        return checkpoint.stored
    settings = checkpoint.config.get("quantization_config") or {}
    settings = settings if isinstance(settings, dict) else {"quant_method": str(settings)[:60]}
    name = _method(settings) if settings else "bitsandbytes"
    if name not in METHODS:
        raise UserError(f"{source} is already quantised ({name}); give the original checkpoint and quant='nf4'")
    stored = METHODS[name].find(checkpoint.folder, checkpoint.tensors)
    if settings and not stored:
        raise UserError(
            f"{source}: config.json says that it is quantised ({name}), but no tensor is packed: delete the entry "
            "quantization_config from config.json to load it as it is (quant= packs it)"
        )
    if stored and quant is not None and not METHODS[name].partly:
        formats = ", ".join(sorted({tensor.format for tensor in stored.values()}))
        raise UserError(
            f"{source} is already quantised ({formats}) and is loaded as it is: leave quant out, or give the "
            "original checkpoint"
        )
    return stored


def read_packed(stored: Stored, dtype: np.dtype) -> PackedArray:
    """The packed kernel [*stack, D, N] as host arrays, its codes in jlora's order.

    Args:
        dtype: the dtype that dequantised values are rounded to, if the files do not say.
    """
    dtype = stored.dtype or dtype
    return stored.read(dtype) if stored.read else BY_FORMAT[stored.format].read(stored, dtype)


def _method(settings: Mapping[str, Any]) -> str:
    ours = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # early versions wrote these without a method
    return settings.get("quant_method") or ("bitsandbytes" if ours else "an unnamed method")
