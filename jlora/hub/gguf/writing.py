"""Writes models and adapters as GGUF files for llama.cpp, tensor by tensor."""

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jlora import lora, tree
from jlora.ends import template_end
from jlora.errors import UserError
from jlora.families.layouts import Layout, Sizes
from jlora.hub.checkpoints import mxfp4, names
from jlora.hub.checkpoints.beside import alone
from jlora.hub.checkpoints.source import locate
from jlora.hub.checkpoints.writing import Piece, as_written, changed_paths, pieces_of, tensors_of
from jlora.hub.gguf.file import Progress, Tensor, require_name, write_file
from jlora.hub.gguf.metadata import HEAD, check, describe, gguf_of, sizes_of
from jlora.hub.gguf.mixtures import FILE_TYPES, PLAIN, types_of
from jlora.hub.gguf.mxfp4 import TYPE, packed
from jlora.hub.gguf.reading import tokenizer_fields
from jlora.hub.gguf.tokenizer import PHI3, UNUSED, named, strips_spaces, tokenizer_metadata
from jlora.hub.tokenizer import is_byte_level, load_tokenizer
from jlora.lora.kinds import CARRIED, COPIES, PRODUCT, not_held
from jlora.lora.kinds.copies import original
from jlora.lora.kinds.kind import RANK, SCALE
from jlora.lora.kinds.product import A, B
from jlora.lora.sites import tie
from jlora.models.model import SCORE
from jlora.types import Params, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jlora.models import Model

# The kinds of adapter that it holds, and the ends of their tensors' names.
HOLDS, ENDS = (PRODUCT,), ("lora_a", "lora_b")
EMBEDDING = "token_embd.weight"


def save_gguf(
    path: str | Path,
    model: "Model",
    params: Params,
    tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None,
    *,
    dtype: str = "f16",
    progress: Progress | None = None,
    force: bool = False,
) -> None:
    """Writes the model as a file NAME.gguf, complete or not at all; adapters are merged into their kernels.

    Of a model that also sees or hears, the file holds the language model, as llama.cpp's own files do.

    Merged weights are computed in float32 and rounded or packed once. Which matrices of a packed file get more bits,
    and what becomes of those whose rows are not made of whole blocks, is as `llama-quantize` has it
    (`jlora.hub.gguf.mixtures`); vectors, biases, routers and learned positions stay in float32. gpt-oss's experts in
    MXFP4 stay as they are if no adapter changes them. Warns if they do not, and of a window (Mistral's, Phi-3's)
    that llama.cpp ignores, which changes its results for longer texts.

    Args:
        tokenizer: one of transformers', or the folder, Hub id or GGUF file of a model that has one (a GGUF file's is
            copied as it is); without one, llama.cpp accepts only token ids.
        dtype: one of `jlora.hub.GGUF_TYPES`: "f32", "f16", "bf16", or packed, as "q4_k_m".
        progress: called with (number of tensors written, total).
        force: also replace a GGUF file that jlora did not write.

    Raises:
        ValueError: `params` are not those of `model`, the format cannot hold the model or its tokenizer, or weights are
            not finite or too large for float16.
        FileExistsError: `path` is a folder, a file that is not GGUF, or one that jlora did not write.
        ImportError: the package gguf is not installed.
    """
    require_gguf(path, dtype)
    if SCORE in params:
        raise UserError("GGUF has no score heads for jlora's models: save a reward model with jlora.save_model")
    model, params = alone(*as_written(model, params))
    tensors = _tensors(model, params, dtype)
    metadata, divisors = describe(model.config)
    tensors |= {name: _made(name, value, "F32") for name, value in divisors.items()}
    gguf = gguf_of(model.config)
    metadata = {"general.architecture": gguf.architecture} | metadata
    check(model.config, metadata, _shapes(tensors), divisors.__getitem__)
    if gguf.own_head and HEAD not in tensors:
        tensors[HEAD] = tensors[EMBEDDING]._replace(name=HEAD)
    types = types_of(_shapes(tensors), metadata, dtype)
    metadata |= {
        "general.type": "model",
        "general.file_type": FILE_TYPES[dtype].number,
        "general.quantization_version": 2,
    }
    metadata |= _tokenizer(tokenizer, model, Path(path).stem)
    typed = [tensor._replace(type=tensor.type or types[name]) for name, tensor in tensors.items()]
    write_file(path, metadata, typed, progress, force=force)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def save_gguf_adapter(
    path: str | Path,
    model: "Model",
    params: Params,
    *,
    dtype: str = "f32",
    progress: Progress | None = None,
    force: bool = False,
) -> None:
    """Writes the adapter in `params` as a file NAME.gguf that llama.cpp applies to the base's file (`--lora`).

    An adapter that started from the base's weights (PiSSA, OLoRA) is written as a plain LoRA of twice the rank.

    Args:
        dtype: "f32", "f16" or "bf16".
        progress: called with (number of tensors written, total).
        force: also replace a GGUF file that jlora did not write.

    Raises:
        ValueError: `params` hold no adapter, or one with parts that llama.cpp does not compute: DoRA, biases, trained
            copies, token rows, an embedding or head that came with it, an adapter of an embedding that is the head too.
            All are listed; such an adapter must be merged instead.
        FileExistsError: `path` is a folder, a file that is not GGUF, or one that jlora did not write.
        ImportError: the package gguf is not installed.
    """
    require_gguf(path, dtype, adapter=True)
    model, params = alone(model, lora.with_starts(params))
    factors = _factors(model, params)
    ranks = {name: b.shape[-1] for name, (_, b, _) in factors.items()}
    scales = {name: scale for name, (_, _, scale) in factors.items()}
    # llama.cpp multiplies by alpha / rank and has a single alpha, where 0 means none: if no alpha fits all, the scale
    # goes into B.
    alphas = {scales[name] * ranks[name] for name in factors}
    alpha = (alphas.pop() if len(alphas) == 1 else 0) or max(ranks.values())
    tensors, file = [], FILE_TYPES[dtype]
    for name, (a, b, scale) in factors.items():
        b = b * (scale * ranks[name] / alpha)
        tensors += [_made(f"{name}.{end}", value, file.type) for end, value in zip(ENDS, (a, b), strict=True)]
    metadata = {
        "general.architecture": gguf_of(model.config).architecture,
        "general.type": "adapter",
        "general.name": Path(path).stem,
        "general.file_type": file.number,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    write_file(path, metadata, tensors, progress, force=force)


def _made(name: str, values: np.ndarray, type: str) -> Tensor:
    return Tensor(name, values.shape, type, lambda: np.ascontiguousarray(values, np.float32))


def require_gguf(path: str | Path, dtype: str, *, adapter: bool = False) -> None:
    """Checks that a GGUF file of a model, or of an adapter, can have this name and type.

    Raises:
        ValueError: it cannot.
        ImportError: the package gguf is not installed.
    """
    known = [name for name, file in FILE_TYPES.items() if file.type in PLAIN or not adapter]
    if dtype not in known:
        raise UserError(
            f"dtype={dtype!r}: a GGUF {'adapter' if adapter else 'file'} is written in one of {', '.join(known)}"
        )
    require_name(path)


# ---------------------------------------------------------------- models


def _tensors(model: "Model", params: Params, dtype: str) -> dict[str, Tensor]:
    """GGUF's name → the tensor to write; its type is None if the file's type says which."""
    gguf, kind, sizes = gguf_of(model.config), model.config.model_type, sizes_of(model.config)
    flat = tree.flatten(params)
    kept = mxfp4.written_packed(kind, flat, changed_paths(params))
    if any(path not in kept and mxfp4.holds_experts(path, leaf) for path, leaf in flat.items()):
        warnings.warn(
            f"experts in MXFP4 are written as {dtype}: the adapter changes them, or GGUF cannot hold them as MXFP4",
            stacklevel=3,
        )
    members: dict[str, list[Piece]] = {}
    tensors: dict[str, Tensor] = {}
    for piece in pieces_of(model, params):
        there = names.to_gguf(piece.name, kind)
        if there.joined:
            tensors |= _joined(params, piece, there, sizes, TYPE if piece.path in kept else None)
        else:
            members.setdefault(there.names[0], []).append(piece)
    for name, pieces in members.items():
        pieces.sort(key=lambda piece: piece.tensor.index)
        layout = gguf.layout_of(name)
        shape = pieces[0].tensor.shape[::-1] if layout and layout.transposed else pieces[0].tensor.shape
        shape = (len(pieces), *shape) if _is_expert(name) else shape
        reorder = functools.partial(layout.to_gguf, sizes=sizes) if layout else None
        values = functools.partial(_values, params, pieces, shape, reorder)
        tensors[name] = Tensor(name, shape, None, values)
    return tensors


def _joined(params: Params, piece: Piece, there: names.InGGUF, sizes: Sizes, type: str | None) -> dict[str, Tensor]:
    """GGUF's tensors that the Hub has in one."""
    take = functools.partial(there.joined.taken, sizes=sizes)
    shapes = jax.eval_shape(take, jax.ShapeDtypeStruct(piece.tensor.shape, np.float32))

    def values(part: int) -> np.ndarray:
        if type == TYPE:
            leaf = tree.flatten(params)[piece.path][piece.tensor.index]
            return packed(jax.tree.map(np.asarray, leaf), there.joined, sizes)[part]
        return np.ascontiguousarray(take(tensors_of(params, piece, np.float32)[piece.name])[part])

    return {
        name: Tensor(name, shape.shape, type, functools.partial(values, part))
        for part, (name, shape) in enumerate(zip(there.names, shapes, strict=True))
    }


def _values(
    params: Params, pieces: Sequence[Piece], shape: tuple[int, ...], reorder: Callable[[np.ndarray], np.ndarray] | None
) -> np.ndarray:
    """The GGUF tensor made from these of the Hub's: a single one, or one per expert."""
    parts = [tensors_of(params, piece, np.float32)[piece.name] for piece in pieces]
    return np.stack([reorder(part) if reorder else part for part in parts]).reshape(shape)


def _is_expert(name: str) -> bool:
    return name.endswith("_exps.weight")


def _tokenizer(tokenizer: "PreTrainedTokenizerBase | str | Path | None", model: "Model", name: str) -> dict[str, Any]:
    """The tokenizer's metadata, and the model's name, by which llama.cpp recognises Phi-3's tokenizer."""
    if tokenizer is None:
        return {"general.name": name, "tokenizer.ggml.model": "none"}
    if isinstance(tokenizer, str | Path):
        source = locate(tokenizer)
        if source.suffix == ".gguf":
            fields = {f"tokenizer.{key}": value for key, value in tokenizer_fields(source).items() if value != []}
            fields |= _end_of_turn(source, fields) | _more_tokens(fields, model.config.vocab_size)
            return {"general.name": named(name, strips=bool(re.search(PHI3, _name(source))))} | fields
        tokenizer = load_tokenizer(source)
    return {
        "general.name": named(name, strips=strips_spaces(tokenizer)),
        **tokenizer_metadata(tokenizer, model.config.vocab_size, model.config.eos_token_ids),
    }


def _more_tokens(fields: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The token lists extended to the embedding's rows, for a base that was given more."""
    tokens = fields.get("tokenizer.ggml.tokens", [])
    fillers = {
        "tokenizer.ggml.tokens": [f"[PAD{number}]" for number in range(len(tokens), rows)],
        "tokenizer.ggml.token_type": [UNUSED] * (rows - len(tokens)),
        "tokenizer.ggml.scores": [0.0] * (rows - len(tokens)),
    }
    return {name: [*fields[name], *more] for name, more in fillers.items() if more and name in fields}


def _end_of_turn(source: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The token that the chat template of a GGUF file writes after an answer, if the file names none."""
    name = "tokenizer.ggml.eot_token_id"
    if name in fields or "tokenizer.chat_template" not in fields or not is_byte_level(tokenizer_fields(source)):
        return {}
    end = template_end(load_tokenizer(source))
    return {} if end in (None, fields.get("tokenizer.ggml.eos_token_id")) else {name: end}


def _name(path: Path) -> str:
    """The model's name in a GGUF file."""
    field = require("gguf", "gguf").GGUFReader(path).fields.get("general.name")
    return field.contents() if field else ""


# ---------------------------------------------------------------- adapters


def _factors(model: "Model", params: Params) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """The base tensor's GGUF name → (A [R, inputs], B [outputs, R], scale), in llama.cpp's layout."""
    flat, gguf, kind = tree.flatten(params), gguf_of(model.config), model.config.model_type
    sizes, problems = sizes_of(model.config), _not_plain(flat)
    found: dict[str, list[tuple[tuple[int, ...], np.ndarray, np.ndarray, float]]] = {}
    for path in [path.rpartition("/")[0] for path in flat if path.endswith(f"/{A.name}")]:
        leaf = next((name for name in ("kernel", "embedding", "router") if f"{path}/{name}" in flat), None)
        if leaf is None:  # a head that is the embedding: among the problems already
            continue
        for tensor in names.hub_tensors(f"{path}/{leaf}", tuple(flat[f"{path}/{leaf}"].shape), kind):
            there, layer = names.to_gguf(tensor.name, kind), tensor.index[:1]
            a, b = (np.asarray(flat[f"{path}/{side}"][tensor.index], np.float32) for side in (A.name, B.name))
            rank = int(flat[f"{path}/{RANK.name}"][layer]) if f"{path}/{RANK.name}" in flat else a.shape[-1]
            if not rank:
                continue
            in_other = there.joined and not there.joined.rows
            if in_other or re.fullmatch(gguf.unadapted or "", _in_layer(there.names[0])):
                problems.append(f"{path}: llama.cpp does not apply adapters there; merge it and write the model")
                break
            b = b[..., :rank, :] if tensor.columns is None else b[..., :rank, slice(*tensor.columns)]
            a, b = a[..., :rank], np.swapaxes(b, -1, -2)
            a, scale = a if leaf == "embedding" else np.swapaxes(a, -1, -2), float(flat[f"{path}/{SCALE.name}"][layer])
            for name, (own_a, own_b) in _sorted(there, gguf.layout_of(there.names[0]), a, b, sizes).items():
                found.setdefault(name, []).append((tensor.index, own_a, own_b, scale))
    if problems:
        raise UserError("llama.cpp cannot apply this adapter to a model:\n  " + "\n  ".join(problems))
    if not found:
        raise UserError("there is no adapter in these params (no lora_a leaf); make one with jlora.lora.init")
    factors = {}
    for name, members in found.items():
        members = sorted(members, key=lambda member: member[0])
        a, b = ([member[side] for member in members] for side in (1, 2))
        one_by_one = _is_expert(name) and a[0].ndim == 2
        factors[name] = (*((np.stack(a), np.stack(b)) if one_by_one else (a[0], b[0])), members[0][3])
    return factors


def _in_layer(name: str) -> str:
    """The module's name in its layer."""
    return re.sub(r"^blk\.\d+\.", "", name).rpartition(".")[0]


def _sorted(
    there: names.InGGUF, layout: Layout | None, a: np.ndarray, b: np.ndarray, sizes: Sizes
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """GGUF's name → (A [R, inputs], B [outputs, R]), with inputs and outputs in its order."""
    if there.joined:
        return {name: (a, own) for name, own in zip(there.names, there.joined.split(b, sizes), strict=True)}
    b = layout.to_gguf(b, sizes) if layout and layout.outputs_only else b
    a = layout.to_gguf(a, sizes) if layout and layout.inputs_only else a
    return {there.names[0]: (a, b)}


def _not_plain(flat: Mapping[str, Any]) -> list[str]:
    """A line for each part of the adapter that is not A or B of one of the model's matrices."""
    problems = [f"{path}: {title}; merge the adapter and write the model" for path, title in _parts(flat)]
    pair = tie(flat)
    for path in pair.modules if pair and pair.tied else ():
        if f"{path}/{SCALE.name}" in flat:
            one, other = ("embedding", "head too") if path == pair.embedding else ("head", "embedding")
            problems.append(f"{path}: the {one} is the {other}; merge the adapter and write the model")
    return problems


def _parts(flat: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(module, what it is) of each part that is not a product of two factors."""
    found = not_held(flat, HOLDS)
    titled = {path: f"{title} of its {original(path.rpartition('/')[2])}" for path, title in found.items()}
    parts = {path: titled[path] if COPIES.holds(path.rpartition("/")[2]) else title for path, title in found.items()}
    carried = "weights that came with the adapter in place of the base's"
    parts |= {path: carried for path in flat if path.rpartition("/")[2] == CARRIED.name}
    return [(path.rpartition("/")[0], parts[path]) for path in flat if path in parts]
