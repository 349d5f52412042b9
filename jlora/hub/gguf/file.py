"""Writes GGUF files, complete or not at all, with one tensor in memory at a time."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import UserError
from jlora.hub.cards import TAG
from jlora.hub.checkpoints.folder import GGUF, replacing_file, require_own
from jlora.hub.checkpoints.weights import require_finite
from jlora.hub.gguf import kquants
from jlora.types import require

# Called with (number of tensors written, total).
Progress = Callable[[int, int], None]


class Tensor(NamedTuple):
    """One tensor to write.

    Attributes:
        shape: slowest axis first.
        type: llama.cpp's name of the type it is written in; None while that is not decided.
        values: makes its float32 values, or its bytes if these are packed already.
    """

    name: str
    shape: tuple[int, ...]
    type: str | None
    values: Callable[[], np.ndarray]


def write_file(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    progress: Progress | None = None,
    *,
    force: bool = False,
) -> None:
    """Writes NAME.gguf, complete or not at all, with the tag that says whose it is.

    Args:
        metadata: values by full key, "general.architecture" included; integers are written unsigned.
        force: also replace a GGUF file that jlora did not write.

    Raises:
        ValueError: the name does not end in .gguf, or weights are not finite or too large for float16.
        FileExistsError: `path` is a folder, a file that is not GGUF, or one that jlora did not write.
        ImportError: the package gguf is not installed.
    """
    gguf = require_name(path)
    if not force:
        require_own(path)
    types = {tensor.name: gguf.GGMLQuantizationType[tensor.type] for tensor in tensors}
    with (
        replacing_file(path, magic=GGUF) as fresh,
        contextlib.closing(gguf.GGUFWriter(fresh, metadata["general.architecture"])) as writer,
    ):
        for key, value in ({"general.tags": [TAG]} | metadata).items():
            if key != "general.architecture":
                writer.add_key_value(key, value, _kind(gguf, value))
        for tensor in tensors:
            block, size = gguf.GGML_QUANT_SIZES[types[tensor.name]]
            nbytes = math.prod(tensor.shape) // block * size
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, types[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, start=1):
            values = tensor.values()
            require_finite({tensor.name: values})
            writer.write_tensor_data(_packed(gguf, tensor, values, types[tensor.name]).view(_Checked))
            if progress:
                progress(done, len(tensors))


class _Checked(np.ndarray):
    """An array whose `tofile` raises the disk's errors.

    NumPy's writes through its own buffer and loses the errors of flushing it: on a full disk small tensors would
    silently be missing.
    """

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(np.ascontiguousarray(self).view(np.ndarray).data)


def require_name(path: str | Path) -> Any:
    """The package gguf; raises as `write_file` if a file of this name cannot be written."""
    if Path(path).suffix != ".gguf":
        raise UserError(f"{path}: expected a name that ends in .gguf, by which programs recognise a GGUF file")
    return require("gguf", "gguf")


def _kind(gguf: Any, value: Any) -> Any:
    """The type of a value in the file; llama.cpp expects unsigned integers."""
    return gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)


def _packed(gguf: Any, tensor: Tensor, values: np.ndarray, type: Any) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    # Packed types have scales in float16.
    if tensor.type not in ("F32", "BF16") and largest > float(np.finfo(np.float16).max):
        raise UserError(f"{tensor.name}: weights up to {largest:.3g} are more than float16 holds; write bf16 or f32")
    return kquants.quantize(values, tensor.type) if tensor.type in kquants.KINDS else gguf.quants.quantize(values, type)
