"""gpt-oss's packed experts in safetensors folders: checked before any is read, kept and written bit by bit.

The kernels P [E, D, N] of a layer's experts are `P_blocks`, uint8 [E, N, D/32, 16] with two values a byte, and
`P_scales`, uint8 [E, N, D/32].
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora import quant
from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.family import IN_OUT
from jlora.hub.checkpoints.stored import Stored
from jlora.hub.checkpoints.weights import TensorInfo, read_unchecked
from jlora.quant import PackedMxfp4, QuantConfig
from jlora.quant.mxfp4 import BLOCK, LARGEST

METHOD = "mxfp4"
PART = re.compile(r"(?P<weight>.+)_(?P<part>blocks|scales)")
KERNELS = r"(?P<experts>.*/experts)/[^/]+/kernel"
RULES = ((KERNELS, PackedMxfp4.format), (r".*", None))
# What the published models say is not packed; the patterns are transformers'.
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def said_quant(settings: Mapping[str, Any]) -> QuantConfig:
    """How a checkpoint with this quantization_config is packed.

    Raises:
        UserError: it says that some layers' experts are not packed, and which those are only the tensors tell.
    """
    kept = settings.get("modules_to_not_convert") or []
    if any("experts" in str(item) for item in kept):
        raise UserError(
            f"config.json: modules_to_not_convert of {METHOD} names experts: give the folder with its weights, whose "
            "tensors tell which are packed"
        )
    return QuantConfig(rules=RULES)


def stored_tensors(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    """Name → tensor, for every packed one.

    Raises:
        UserError: tensors are not as transformers writes them; all are listed.
    """
    groups: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    for name, info in sorted(tensors.items()):
        if match := PART.fullmatch(name):
            groups.setdefault(match["weight"], {})[match["part"]] = (name, info)
    faults = [f"{name}: {fault}" for name, parts in groups.items() if (fault := _fault(parts))]
    if faults:
        raise UserError(f"{folder} holds packed tensors that cannot be opened:\n  " + "\n  ".join(faults))
    found = {}
    for name, parts in groups.items():
        experts, outputs, blocks = parts["scales"][1].shape
        found[name] = Stored(PackedMxfp4.format, (blocks * BLOCK, outputs), None, parts, stack=(experts,))
    return found


def _fault(parts: Mapping[str, tuple[str, TensorInfo]]) -> str:
    """What is wrong with a tensor's parts, or ""."""
    if len(parts) < 2:
        return f"has {', '.join(parts)} alone, expected blocks and scales"
    blocks, scales = parts["blocks"][1], parts["scales"][1]
    for part, info in (("blocks", blocks), ("scales", scales)):
        if info.dtype != "U8":
            return f"its {part} are {info.dtype}, expected U8"
    if len(scales.shape) != 3 or blocks.shape != (*scales.shape, BLOCK // 2):
        return (
            f"its blocks are {blocks.shape} and its scales {scales.shape}, expected [E, N, D/32, 16] and [E, N, D/32]"
        )
    return ""


def read_packed(stored: Stored, dtype: np.dtype) -> PackedMxfp4:
    """The packed kernels [E, D, N] as host arrays.

    Args:
        dtype: the dtype that dequantised values are rounded to.

    Raises:
        UserError: scales stand for NaN, or for values that are not finite.
    """
    blocks, scales = (
        read_unchecked(info.file, name) for name, info in (stored.parts["blocks"], stored.parts["scales"])
    )
    if wrong := int(np.sum(scales > LARGEST)):
        name, info = stored.parts["scales"]
        raise UserError(
            f"{info.file}: {name} holds {wrong} of {scales.size} scales by which values are NaN or infinite (above "
            f"{LARGEST}): fetch the file again"
        )
    codes = blocks.reshape(*scales.shape[:-1], -1)
    codes, scales = (np.ascontiguousarray(part.swapaxes(-1, -2)) for part in (codes, scales))
    return PackedMxfp4(codes, scales, stored.matrix, np.dtype(dtype))


def packed_tensors(name: str, leaf: PackedMxfp4) -> dict[str, np.ndarray]:
    """Name → tensor, for packed kernels [E, D, N] on the host: the inverse of `read_packed`."""
    codes, scales = (np.ascontiguousarray(np.swapaxes(part, -1, -2)) for part in (leaf.codes, leaf.scales))
    return {f"{name}_blocks": codes.reshape(*scales.shape, BLOCK // 2), f"{name}_scales": scales}


def written_packed(model_type: str, leaves: Mapping[str, Any], changed: Collection[str]) -> set[str]:
    """The paths of the leaves that a folder for transformers can hold in this format.

    These are the experts of a stack of layers in which all are packed and none is changed.

    Args:
        leaves: the base's.
        changed: the leaves that an adapter changes.
    """
    if FAMILIES[model_type].stacked_experts != IN_OUT:
        return set()
    groups: dict[str, set[str]] = {}
    for path in leaves:
        if match := re.fullmatch(KERNELS, path):
            groups.setdefault(match["experts"], set()).add(path)

    def holds(path: str) -> bool:
        return path not in changed and holds_experts(path, leaves[path]) and leaves[path].shape[-2] % BLOCK == 0

    return {path for paths in groups.values() if all(map(holds, paths)) for path in paths}


def can_hold(model_type: str, leaves: Mapping[str, Any]) -> bool:
    """Whether a folder for transformers can hold the packed experts among the leaves, if any, and all else packed."""
    packed = {path for path in leaves if quant.format_of(leaves[path])}
    return packed == written_packed(model_type, leaves, ()) or not any(re.fullmatch(KERNELS, path) for path in packed)


def holds_experts(path: str, leaf: Any) -> bool:
    """Whether the leaf is the kernel of experts, packed in this format (and not only when it is used)."""
    return bool(re.fullmatch(KERNELS, path)) and quant.format_of(leaf) == METHOD and not quant.packs_update(leaf)


def settings(before: Mapping[str, Any] | None, unpacked: Collection[str]) -> dict[str, Any]:
    """config.json's quantization_config.

    Args:
        before: that of the checkpoint that the model is from, if it had one.
        unpacked: names of modules of experts that are not packed.
    """
    said = before.get("modules_to_not_convert") if before and before.get("quant_method") == METHOD else None
    kept = [item for item in (KEPT if said is None else said) if "experts" not in str(item)]
    return {"quant_method": METHOD, "modules_to_not_convert": [*kept, *sorted(unpacked)]}
