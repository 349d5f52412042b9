"""bitsandbytes' packed tensors in safetensors folders: checked before any is read, and kept bit by bit.

A packed `P.weight` is recognised by the tensors beside it, never by config.json: either
`P.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) with its block scales, or `P.SCB`, the scales of LLM.int8's rows.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora.errors import UserError
from jlora.families.kinds import NUMBER
from jlora.hub.checkpoints.stored import Stored
from jlora.hub.checkpoints.weights import TensorInfo, read_tensor, read_unchecked
from jlora.quant import Packed4bit, PackedArray, PackedInt8, QuantConfig, as_config, four_bit
from jlora.quant.scales import NESTED_BLOCK, dynamic_map

COMPANION = re.compile(
    r"(?P<weight>.+\.weight)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
    r"|(?P<module>.+)\.(?P<row>SCB|weight_format)"
)
STATE = "quant_state.bitsandbytes__"
VALUES = ("absmax", "nested_absmax", "SCB")  # the parts that hold scales
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# torch computes the maps, and its last bit differs between processors.
MAP_TOLERANCE = 1e-6


class Layout(NamedTuple):
    """How bitsandbytes stores a format.

    Attributes:
        bits: config.json says load_in_4bit or load_in_8bit.
        read: (the packed tensor, its parts' values, the dequantised values' dtype) → the kernel.
        write: (the weight's name, the kernel) → tensors.
    """

    bits: int
    read: Callable[[Stored, Mapping[str, np.ndarray], np.dtype], PackedArray]
    write: Callable[[str, Any], dict[str, np.ndarray]]


def said_quant(settings: Mapping[str, Any]) -> QuantConfig:
    """How a checkpoint with this quantization_config is packed."""
    if settings.get("load_in_8bit"):
        return as_config("int8")
    form = as_config(settings.get("bnb_4bit_quant_type", "fp4"))
    return dataclasses.replace(form, double_quant=bool(settings.get("bnb_4bit_use_double_quant")))


def stored_tensors(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    """Name → tensor, for every packed one; the small tensors beside them (states, code books) are read and checked.

    Raises:
        ValueError: tensors are not as bitsandbytes writes them, or have settings that jlora does not have; all are
            listed.
    """
    found: dict[str, Stored] = {}
    problems: list[str] = []
    for weight, parts in _groups(tensors).items():
        faults: list[str] = []
        stored = _int8(parts, faults) if "SCB" in parts else _four_bit(parts, faults)
        problems += [f"{weight}: {fault}" for fault in faults]
        if stored is not None:
            found[weight] = stored
    if problems:
        raise UserError(f"{folder} holds packed tensors that cannot be opened:\n  " + "\n  ".join(problems))
    return found


def read_packed(stored: Stored, dtype: np.dtype) -> PackedArray:
    """The packed kernel [D, N] as host arrays, its codes in jlora's order.

    Args:
        dtype: the dtype that dequantised values are rounded to.
    """
    parts = {part: _read(entry) for part, entry in stored.parts.items() if part in VALUES}
    name, info = stored.parts["weight"]
    parts["weight"] = read_unchecked(info.file, info.stored or name)  # bytes, in whatever dtype
    return FORMATS[stored.format].read(stored, parts, np.dtype(dtype))


def packed_tensors(name: str, leaf: PackedArray) -> dict[str, np.ndarray]:
    """Name → tensor, for a packed kernel [D, N] on the host under the weight's `name`: the inverse of `read_packed`."""
    return FORMATS[leaf.format].write(name, leaf)


def state_bytes(state: Mapping[str, Any]) -> np.ndarray:
    """The uint8 tensor that holds a quant_state."""
    return np.frombuffer(json.dumps(dict(state)).encode(), np.uint8)


def _groups(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, tuple[str, TensorInfo]]]:
    """Name of a packed weight → its parts; integer weights with nothing beside them are included."""
    groups: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    for name, info in sorted(tensors.items()):
        if match := COMPANION.fullmatch(name):
            weight = match["weight"] or f"{match['module']}.weight"
            groups.setdefault(weight, {})[match["part"] or match["row"]] = (name, info)
        elif name.endswith(".weight") and info.dtype in ("U8", "I8"):
            groups.setdefault(name, {})
    for weight, parts in groups.items():
        if weight in tensors:
            parts["weight"] = (weight, tensors[weight])
    return groups


def _read(entry: tuple[str, TensorInfo]) -> np.ndarray:
    name, info = entry
    return read_tensor(info.file, info.stored or name)


def _int8(parts: Mapping[str, tuple[str, TensorInfo]], faults: list[str]) -> Stored | None:
    shape = parts["weight"][1].shape if "weight" in parts else None
    if shape is None or len(shape) != 2:
        faults.append(f"int8 weights have shape {shape}, expected [out, in]")
        return None
    _expect(parts, "weight", shape, ("I8",), faults)
    _expect(parts, "SCB", (shape[0],), ("F32",), faults)
    if "weight_format" in parts:
        code = int(_read(parts["weight_format"]).ravel()[0])
        if code != 0:
            faults.append(f"weight_format is {code}, expected 0 (by rows)")
    return Stored("int8", (shape[1], shape[0]), None, dict(parts))


def _four_bit(parts: Mapping[str, tuple[str, TensorInfo]], faults: list[str]) -> Stored | None:
    states = [part for part in parts if part.startswith(STATE)]
    if len(states) != 1:
        found = ", ".join(sorted(set(parts) - {"weight"})) or "nothing"
        faults.append(f"beside it lie {found}, expected one {STATE}nf4 or {STATE}fp4, or SCB")
        return None
    state, format = _state(parts[states[0]], faults), states[0].removeprefix(STATE)
    if state is None:
        return None
    nested = "nested_absmax" in parts or any(key.startswith("nested_") for key in state)
    wrong = _wrong_settings(state, format, nested)
    faults += wrong
    if wrong:
        return None
    outputs, inputs = state["shape"]
    _check_parts(parts, format, outputs * inputs, nested, faults)
    offset = state["nested_offset"] if nested else None
    return Stored(format, (inputs, outputs), DTYPES[state["dtype"]], dict(parts), offset)


def _wrong_settings(state: Mapping[str, Any], format: str, nested: bool) -> list[str]:
    """A line for each setting of a quant_state that jlora does not have."""
    known = [name for name, layout in FORMATS.items() if layout.bits == 4]
    expected = {"quant_type": format if format in known else " or ".join(known), "blocksize": four_bit.BLOCK}
    expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"} if nested else {}
    wrong = [
        f"{key} is {state.get(key)!r}, expected {want!r}" for key, want in expected.items() if state.get(key) != want
    ]
    if state.get("dtype") not in DTYPES:
        wrong.append(f"dtype is {state.get('dtype')!r}, expected one of {', '.join(DTYPES)}")
    shape = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
        wrong.append(f"shape is {shape!r}, expected [out, in]")
    if nested and not NUMBER.holds(state.get("nested_offset")):
        wrong.append(f"nested_offset is {state.get('nested_offset')!r}, expected a number")
    return wrong


def _state(entry: tuple[str, TensorInfo], faults: list[str]) -> dict[str, Any] | None:
    try:
        state = json.loads(_read(entry).astype(np.uint8).tobytes())
    except ValueError as error:
        faults.append(f"{entry[0]} is not JSON: {error}")
        return None
    if not isinstance(state, dict):
        faults.append(f"{entry[0]} holds {type(state).__name__}, expected an object")
        return None
    return state


def _check_parts(
    parts: Mapping[str, tuple[str, TensorInfo]], format: str, size: int, nested: bool, faults: list[str]
) -> None:
    blocks, count = -(-size // four_bit.BLOCK), -(-size // 2)
    if "weight" not in parts:
        faults.append("the codes are missing")
    else:
        info = parts["weight"][1]
        width = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}.get(info.dtype, 0)
        if int(np.prod(info.shape)) * width != count:
            faults.append(f"the codes are {info.dtype} {info.shape}, expected {count} bytes")
    _expect(parts, "absmax", (blocks,), ("U8",) if nested else ("F32",), faults)
    maps = {"quant_map": four_bit.CODEBOOKS[format]}
    if nested:
        _expect(parts, "nested_absmax", (-(-blocks // NESTED_BLOCK),), ("F32",), faults)
        maps["nested_quant_map"] = dynamic_map()
    for part, known in maps.items():
        if _expect(parts, part, known.shape, ("F32",), faults):
            difference = np.abs(_read(parts[part]) - known)
            if not np.all(difference <= MAP_TOLERANCE * np.abs(known)):
                faults.append(f"{part} is not bitsandbytes' for {format}: values differ by {difference.max():.3g}")


def _expect(
    parts: Mapping[str, tuple[str, TensorInfo]],
    part: str,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...],
    faults: list[str],
) -> bool:
    """Whether the part is there as expected; if not, what is wrong is added to `faults`."""
    if part not in parts:
        faults.append(f"{part} {shape} is missing")
        return False
    info = parts[part][1]
    if info.shape != shape or info.dtype not in dtypes:
        faults.append(f"{part} is {info.dtype} {info.shape}, expected {' or '.join(dtypes)} {shape}")
        return False
    return True


def _read_int8(stored: Stored, parts: Mapping[str, np.ndarray], dtype: np.dtype) -> PackedInt8:
    return PackedInt8(np.ascontiguousarray(parts["weight"].T), parts["SCB"].reshape(1, -1), dtype)


def _write_int8(name: str, leaf: PackedInt8) -> dict[str, np.ndarray]:
    module = name.removesuffix(".weight")
    return {
        name: np.ascontiguousarray(leaf.codes.T),
        f"{module}.SCB": leaf.scale.ravel(),
        f"{module}.weight_format": np.zeros((), np.uint8),
    }


def _read_four_bit(stored: Stored, parts: Mapping[str, np.ndarray], dtype: np.dtype) -> Packed4bit:
    nested, offset = None, None
    if stored.offset is not None:
        nested, offset = parts["nested_absmax"].ravel(), np.asarray(stored.offset, np.float32)
    codes = parts["weight"].ravel().view(np.uint8)  # with FSDP, the bytes are stored in a wider dtype
    return four_bit.from_flat(
        codes, parts["absmax"].ravel(), nested, offset, format=stored.format, matrix=stored.matrix, dtype=dtype
    )


def _write_four_bit(name: str, leaf: Packed4bit) -> dict[str, np.ndarray]:
    codes, absmax = four_bit.to_flat(leaf)
    inputs, outputs = leaf.matrix
    state = {
        "quant_type": leaf.format,
        "blocksize": four_bit.BLOCK,
        "dtype": leaf.dtype.name,
        "shape": [outputs, inputs],
    }
    tensors = {name: codes.reshape(-1, 1), f"{name}.absmax": absmax}
    tensors[f"{name}.quant_map"] = four_bit.CODEBOOKS[leaf.format]
    if leaf.nested_absmax is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(leaf.offset)}
        tensors |= {f"{name}.nested_absmax": leaf.nested_absmax, f"{name}.nested_quant_map": dynamic_map()}
    tensors[f"{name}.{STATE}{leaf.format}"] = state_bytes(state)
    return tensors


# The formats that bitsandbytes has too.
FORMATS = {
    "nf4": Layout(4, _read_four_bit, _write_four_bit),
    "fp4": Layout(4, _read_four_bit, _write_four_bit),
    "int8": Layout(8, _read_int8, _write_int8),
}
