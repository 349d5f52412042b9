"""Writes packed models as transformers does, with bitsandbytes or in MXFP4; packed parts are the same bit by bit."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jlora import lora, quant, tree
from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.family import IN_OUT
from jlora.hub.cards import Card, model_card
from jlora.hub.checkpoints import mxfp4, names
from jlora.hub.checkpoints.beside import Beside, beside, part_of
from jlora.hub.checkpoints.bitsandbytes import FORMATS, packed_tensors, stored_tensors
from jlora.hub.checkpoints.methods import BY_FORMAT
from jlora.hub.checkpoints.score import only_scored
from jlora.hub.checkpoints.writing import (
    SHARD_BYTES,
    Entry,
    Piece,
    configs,
    pieces_of,
    save_model,
    spelled,
    tensors_of,
    untied,
    write_folder,
)
from jlora.models.model import SCORE
from jlora.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jlora.models import Model


def save_quantized(
    path: str | Path,
    model: "Model",
    params: Params,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    card: Card | None = None,
    force: bool = False,
) -> None:
    """Writes the model as transformers and bitsandbytes write a packed one, complete or not at all.

    Packed kernels are written as they are, all others in 16 or 32 bits and named in llm_int8_skip_modules. Experts in
    MXFP4 are written as gpt-oss's are, without bitsandbytes.

    Args:
        shard_bytes: the most bytes of tensors in one file; larger models get several files and an index.
        card: the model card (None: one that says how to open the folder). One that is there and was changed stays.
        force: also replace a model or an adapter that jlora did not write.

    Raises:
        ValueError: `params` are not those of `model`, or bitsandbytes' format cannot hold them; all is listed.
        FileExistsError: `path` holds something other than a model.
    """
    leaves = tree.flatten(params)
    if mxfp4.METHOD in map(quant.format_of, leaves.values()):
        _require_mxfp4(model, leaves)
        save_model(path, model, params, tokenizer, shard_bytes=shard_bytes, card=card, force=force)
        return
    params = only_scored(model, params) if SCORE in params else params
    model = untied(model, params)
    pieces, others = pieces_of(model, params), beside(model)
    leaves = tree.flatten(params)
    kept = {path for path, leaf in leaves.items() if quant.is_packed(leaf)}
    packed = {piece.name: leaves[piece.path] for piece in pieces if piece.path in kept}
    format = _one_format(pieces, leaves)
    config, generation = configs(model, pieces, tokenizer)
    skipped = _skipped(model, pieces, packed) + (_unpacked_beside(others, format) if others else [])
    config["quantization_config"] = _settings(format, packed, config["dtype"], skipped)
    entries = [
        Entry(_nbytes(piece, leaves[piece.path]), functools.partial(_packed, piece, leaves[piece.path]))
        if piece.path in kept
        else Entry(piece.nbytes, functools.partial(tensors_of, params, piece))
        for piece in spelled(pieces, others)
    ]
    card = card or model_card("model", (), relation="quantized", scored=SCORE in params)
    write_folder(path, (config, generation), entries, tokenizer, shard_bytes, card, others, force=force)


def quantizable(format: str) -> tuple[tuple[str, str | None], ...]:
    """QuantConfig's rules for what such a folder can hold in `format`: the linears of every layer, but not experts.

    In MXFP4 it is the other way round.

    Raises:
        ValueError: no such folder can hold the format.
    """
    if format not in BY_FORMAT:
        raise UserError(
            f"bitsandbytes has no format {format!r}; expected one of {', '.join(FORMATS)}, or {mxfp4.METHOD} for the "
            "experts of gpt-oss"
        )
    if format == mxfp4.METHOD:
        return mxfp4.RULES
    return ((r".*/experts/.*", None), *quant.as_config(format).rules)


def _require_mxfp4(model: "Model", leaves: Mapping[str, Any]) -> None:
    """Checks that transformers can open the packed leaves, of which some are in MXFP4.

    Raises:
        UserError: it cannot; all problems are listed.
    """
    problems = [f"{path}: an adapter; merge it and quantise again" for path in leaves if lora.is_adapter(path)]
    if FAMILIES[model.config.model_type].stacked_experts != IN_OUT:
        problems.append(f"transformers has MXFP4 only for the experts of gpt-oss, not for {model.config.model_type}")
    fit = mxfp4.written_packed(model.config.model_type, leaves, ())
    problems += [
        f"{path}: is packed ({leaf.format}); such a folder has both kernels of a layer's experts packed, with inputs "
        f"that are a multiple of {mxfp4.BLOCK}, and nothing else"
        for path, leaf in leaves.items()
        if quant.format_of(leaf) and path not in fit
    ]
    if problems:
        raise UserError("no folder in MXFP4 can hold these params:\n  " + "\n  ".join(problems))


def _one_format(pieces: Sequence[Piece], leaves: Mapping[str, Any]) -> str:
    """The format of all packed leaves.

    Raises:
        ValueError: bitsandbytes' format cannot hold the leaves; all problems are listed.
    """
    problems = [f"{path}: an adapter; merge it and quantise again" for path in leaves if lora.is_adapter(path)]
    formats: dict[str, str] = {}
    for path in dict.fromkeys(piece.path for piece in pieces):
        leaf = leaves[path]
        if not quant.is_packed(leaf):
            continue
        if leaf.packs_update:
            problems.append(f"{path}: is packed only when it is used (merge_aware); lora.merge packs it")
            continue
        formats[path] = leaf.format
        if formats[path] not in FORMATS:
            problems.append(f"{path}: bitsandbytes has no format {formats[path]!r}, only {', '.join(FORMATS)}")
        elif not path.endswith("/kernel") or "/experts/" in path:
            problems.append(f"{path}: transformers packs the kernels of linears only")
    found = sorted(set(formats.values()))
    if len(found) > 1:
        problems.append(f"packed leaves are {' and '.join(found)}, but a folder has one format")
    if not found:
        problems.append("nothing is packed: jlora.save_model writes such a model")
    if problems:
        raise UserError("bitsandbytes' format cannot hold these params:\n  " + "\n  ".join(problems))
    return found[0]


def _skipped(model: "Model", pieces: Sequence[Piece], packed: Mapping[str, Any]) -> list[str]:
    """Names of the linears that are not packed, including the head even if it is tied."""
    unpacked = [
        piece.name.removesuffix(".weight")
        for piece in pieces
        if re.fullmatch(r".*/(kernel|router)", f"/{piece.path}") and piece.name not in packed
    ]
    head = names.module_names(model.config.names.head, 1)
    return sorted({*unpacked, *(name for name in head if f"{name}.weight" not in packed)})


def _unpacked_beside(others: Beside, format: str) -> list[str]:
    """Names of the modules of the other parts that are not packed.

    Raises:
        UserError: some are packed in another format.
    """
    parts = stored_tensors(others.folder, others.tensors)
    if wrong := sorted(name for name, stored in parts.items() if stored.format != format):
        found = parts[wrong[0]].format
        raise UserError(
            f"{others.folder}: parts beside the language model are packed in {found} ({wrong[0]}, …), and a folder "
            f"has one format, here {format}"
        )
    kinds: dict[str, list[str]] = {}
    for name in others.tensors:
        kinds.setdefault(part_of(name), []).append(name)
    whole = [part for part, names in kinds.items() if not parts.keys() & set(names)]
    # transformers' names of modules, and older ones; in a part with packed tensors, each module by itself.
    single = [name for part in kinds.keys() - set(whole) for name in kinds[part] if name not in parts]
    modules = [name.removesuffix(".weight") for name in single if name.endswith(".weight")]
    return sorted({*(prefix + part for part in whole for prefix in ("", "model.")), *modules})


def _settings(format: str, packed: Mapping[str, Any], dtype: str, skipped: list[str]) -> dict[str, Any]:
    """config.json's quantization_config."""
    four = FORMATS[format].bits == 4
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": format if four else "fp4",
        "bnb_4bit_use_double_quant": four and any(leaf.nested_absmax is not None for leaf in packed.values()),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    }


def _packed(piece: Piece, leaf: Any) -> dict[str, np.ndarray]:
    index = piece.tensor.index
    return packed_tensors(piece.name, jax.tree.map(np.asarray, leaf[index]))


def _nbytes(piece: Piece, leaf: Any) -> int:
    return tree.nbytes(leaf) * int(np.prod(piece.tensor.shape)) // leaf.size
