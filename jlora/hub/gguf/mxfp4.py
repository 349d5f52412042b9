"""gpt-oss's experts in GGUF, taken over and written bit by bit.

A block of 32 values is 17 bytes: its scale, then its codes, of which a byte holds value j and, in the high half,
value j + 16. gpt-oss's own files, and jlora, have two neighbours in a byte.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.errors import UserError
from jlora.families.layouts import Joined, Sizes
from jlora.hub.checkpoints.stored import Stored
from jlora.hub.checkpoints.weights import TensorInfo
from jlora.quant import PackedMxfp4
from jlora.quant.mxfp4 import BLOCK, LARGEST

TYPE = "MXFP4"  # llama.cpp's name of it
HALF = BLOCK // 2


def can_stay(tensors: Sequence[Any], joined: Joined) -> bool:
    """Whether these tensors of a file are kernels that stay packed: gpt-oss's, [in, out] on the Hub."""
    packed = all(tensor.tensor_type.name == TYPE and len(tensor.shape) == 3 for tensor in tensors)
    return packed and joined.rows and joined.turned


def stored(tensors: Sequence[Any], joined: Joined, info: TensorInfo, sizes: Sizes) -> Stored:
    """How the kernels [E, D, N] of a layer are packed.

    Args:
        info: what the file says of the Hub's tensor.
    """
    *stack, inputs, outputs = info.shape
    read = functools.partial(_read, tensors, joined, sizes, (inputs, outputs))
    part = tensors[0].name, info
    return Stored(PackedMxfp4.format, (inputs, outputs), None, {"blocks": part}, stack=tuple(stack), read=read)


def _read(
    tensors: Sequence[Any], joined: Joined, sizes: Sizes, matrix: tuple[int, int], dtype: np.dtype
) -> PackedMxfp4:
    """The packed kernels as host arrays.

    Raises:
        UserError: scales stand for NaN, or for values that are not finite.
    """
    codes, scales = [], []
    for tensor in tensors:
        blocks = tensor.data.reshape(*tensor.data.shape[:-1], -1, 1 + HALF)
        if wrong := int(np.sum(blocks[..., 0] > LARGEST)):
            raise UserError(
                f"{tensor.name} holds {wrong} of {blocks[..., 0].size} scales by which values are NaN or infinite "
                f"(above {LARGEST}): fetch the file again"
            )
        scales.append(blocks[..., 0])
        codes.append(_neighbours(blocks[..., 1:]))
    found = (np.ascontiguousarray(joined.made(parts, sizes)) for parts in (codes, scales))
    return PackedMxfp4(*found, matrix, np.dtype(dtype))


def packed(leaf: PackedMxfp4, joined: Joined, sizes: Sizes) -> tuple[np.ndarray, ...]:
    """The bytes of each of a file's tensors, for packed kernels [E, D, N] on the host."""
    codes, scales = (joined.taken(np.asarray(part), sizes) for part in (leaf.codes, leaf.scales))
    found = []
    for code, scale in zip(codes, scales, strict=True):
        blocks = np.concatenate([scale[..., None], _halves(code.reshape(*scale.shape, HALF))], axis=-1)
        found.append(np.ascontiguousarray(blocks.reshape(*scale.shape[:-1], -1)))
    return tuple(found)


def _neighbours(codes: np.ndarray) -> np.ndarray:
    """Codes [..., blocks, 16] with values j and j + 16 in a byte → [..., 16 · blocks] with 2·j and 2·j + 1."""
    values = np.concatenate([codes & 15, codes >> 4], axis=-1)
    pairs = values[..., 0::2] | values[..., 1::2] << 4
    return pairs.reshape(*pairs.shape[:-2], -1)


def _halves(codes: np.ndarray) -> np.ndarray:
    """The inverse, but for blocks [..., 16]."""
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], BLOCK)
    return values[..., :HALF] | values[..., HALF:] << 4
