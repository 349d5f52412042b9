"""Experts of a layer that a file has in one tensor, as transformers has in memory, taken apart as they are read."""

import functools
import re
from collections.abc import Collection

from jlora.hub.checkpoints.names import EXPERT_PARTS
from jlora.hub.checkpoints.weights import SafetensorsFolder, TensorInfo, read_part

STACKED = re.compile(rf"(?P<experts>.+\.experts)\.(?P<kernel>{'|'.join(EXPERT_PARTS)})")


def take_apart(checkpoint: SafetensorsFolder, expected: Collection[str]) -> None:
    """Replaces tensors of all experts by those of each expert, if the model expects these.

    mlp.experts.gate_up_proj [E, 2·F, D]  →  mlp.experts.{0…E-1}.gate_proj.weight, …up_proj.weight, each [F, D]
    """
    for name, info in [*checkpoint.tensors.items()]:
        if (match := STACKED.fullmatch(name)) and len(info.shape) == 3:
            parts = _parts(info, match["experts"], EXPERT_PARTS[match["kernel"]])
            if parts.keys() <= set(expected):
                del checkpoint.tensors[name]
                for part, (index, shape) in parts.items():
                    checkpoint.tensors[part] = info._replace(shape=shape)
                    checkpoint.made[part] = functools.partial(read_part, info.file, info.stored or name, index)


def _parts(
    info: TensorInfo, experts: str, kernels: tuple[str, ...]
) -> dict[str, tuple[tuple[int | slice, ...], tuple[int, int]]]:
    """Name of one expert's kernel → (its place in the tensor, its shape)."""
    count, rows, columns = info.shape
    width = rows // len(kernels)
    return {
        f"{experts}.{expert}.{kernel}.weight": ((expert, slice(i * width, (i + 1) * width)), (width, columns))
        for expert in range(count)
        for i, kernel in enumerate(kernels)
    }
