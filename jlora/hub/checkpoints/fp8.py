"""Checkpoints whose linears are stored in 8-bit floats with scales (quant_method "fp8"), read as the values they mean.

W.weight [N, D] float8_e4m3  ·  W.weight_scale_inv, a number or one for each block  →  W.weight in float32

That is what transformers reads them as (`dequantize`). Scales of activations are not used.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jlora.errors import UserError, describe_faults
from jlora.hub.checkpoints.weights import DTYPES, SafetensorsFolder, TensorInfo, read_tensor, require_finite

METHOD, SETTINGS = "fp8", "quantization_config"
SCALE, ACTIVATIONS = "_scale_inv", "activation_scale"
STORED, VALUES = "F8_E4M3", "F32"


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A weight in 8 bits and its scales."""

    name: str
    weight: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]

    def read(self) -> np.ndarray:
        """The values in float32.

        Raises:
            UserError: they cannot be read, or are not finite.
        """
        start, _ = self.weight.span
        stored = np.fromfile(self.weight.file, np.uint8, math.prod(self.weight.shape), offset=start)
        values = stored.view(ml_dtypes.float8_e4m3fn).reshape(self.weight.shape).astype(np.float32)
        scale = read_tensor(self.scale.file, self.scale.stored or f"{self.name}{SCALE}").astype(np.float32)
        rows, columns = self.weight.shape
        grid = scale.reshape(self.grid)
        for axis, size in enumerate(self.block):
            grid = np.repeat(grid, size, axis=axis)
        values *= grid[:rows, :columns]
        require_finite({f"{self.weight.file}: {self.name}": values})
        return values

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks there are along the two axes."""
        return tuple(-(-size // block) for size, block in zip(self.weight.shape, self.block, strict=True))


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json says that weights are stored so."""
    settings = config.get(SETTINGS)
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def unscaled(checkpoint: SafetensorsFolder) -> SafetensorsFolder:
    """The checkpoint as if it held the values themselves; its config.json no longer says that they are packed.

    Raises:
        UserError: scales are missing or of another shape or kind; all are listed.
    """
    if not is_fp8(checkpoint.config):
        return checkpoint
    tensors, settings = checkpoint.tensors, checkpoint.config.pop(SETTINGS)
    block = settings.get("weight_block_size")
    problems: list[str] = []
    for name in [name for name, info in tensors.items() if info.dtype == STORED]:
        scale = tensors.pop(f"{name}{SCALE}", None)
        tensors.pop(f"{name.rpartition('.')[0]}.{ACTIVATIONS}", None)
        if fault := _fault(tensors[name], scale, block):
            problems.append(f"{name}: {fault}")
            continue
        blocks = tuple(block) if block and scale.shape else tensors[name].shape
        checkpoint.made[name] = Scaled(name, tensors[name], scale, blocks).read
        checkpoint.scaled += 1
        tensors[name] = tensors[name]._replace(dtype=VALUES)
    if problems:
        raise UserError(describe_faults(f"{checkpoint.folder}: weights in 8 bits that cannot be read", problems))
    return checkpoint


def say_unscaled(checkpoint: SafetensorsFolder) -> None:
    """Warns that weights in 8 bits were read as the values that they stand for."""
    if checkpoint.scaled:
        warnings.warn(
            f"{checkpoint.folder}: {checkpoint.scaled} weights are stored in 8 bits (fp8); they were read as the "
            "values that they stand for, and a model that is written has them unpacked",
            stacklevel=3,
        )


def _fault(weight: TensorInfo, scale: TensorInfo | None, block: Any) -> str | None:
    sizes = isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if block is not None and not sizes:
        return f"weight_block_size is {block!r}, expected two whole numbers, or null"
    if scale is None:
        return f"there is no {SCALE.removeprefix('_')} beside it"
    if scale.dtype not in DTYPES:
        return f"its scales are {scale.dtype}, expected one of {', '.join(DTYPES)}"
    if len(weight.shape) != 2:
        return f"it has shape {weight.shape}, expected [out, in]"
    blocks = block if block and scale.shape else weight.shape
    expected = tuple(-(-size // length) for size, length in zip(weight.shape, blocks, strict=True))
    if math.prod(scale.shape) != math.prod(expected):
        return f"its scales have shape {scale.shape}, expected {expected if block else ()}"
    return None
