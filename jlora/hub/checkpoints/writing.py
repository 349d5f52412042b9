"""Writes models as Hugging Face folders for transformers: adapters are merged and packed leaves unpacked one by one."""

import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jlora import lora, quant, tree
from jlora.ends import end_ids
from jlora.errors import UserError, size_of
from jlora.families import FAMILIES
from jlora.hub.cards import FILE as CARD
from jlora.hub.cards import Card, is_as_written, model_card
from jlora.hub.checkpoints import mxfp4, names
from jlora.hub.checkpoints.beside import PROCESSOR, Beside, beside
from jlora.hub.checkpoints.bitsandbytes import COMPANION
from jlora.hub.checkpoints.folder import replacing, require_own
from jlora.hub.checkpoints.older import for_every_reader, save_tokenizer
from jlora.hub.checkpoints.score import KERNEL, only_scored, scored_config, scored_leaves
from jlora.hub.checkpoints.shards import save_shard
from jlora.hub.checkpoints.weights import INDEX, SINGLE, TensorInfo, require_finite
from jlora.lora.kinds import BIAS, changed_leaves, leaf_of
from jlora.lora.kinds.kind import SETTINGS
from jlora.models.model import SCORE
from jlora.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jlora.models import Model

SHARD_BYTES = 5_000_000_000
STALE = ("*.safetensors", INDEX, "pytorch_model*", "generation_config.json", *PROCESSOR)
# All files that transformers may write for a tokenizer, or read as part of one, so that an old one is not mixed with
# the new one.
TOKENIZER = (
    *("tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.*", "merges.txt", "*.model", "chat_template.*", "additional_chat_templates"),
)


class Piece(NamedTuple):
    """One tensor to write, and the leaf it comes from."""

    tensor: names.HubTensor
    path: str
    dtype: np.dtype

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.tensor.shape)) * self.dtype.itemsize


class Entry(NamedTuple):
    """Tensors that are written together.

    Attributes:
        nbytes: about how many bytes they have.
        tensors: makes the tensors, by name; called when their file is written. A TensorInfo is copied.
    """

    nbytes: int
    tensors: Callable[[], Mapping[str, np.ndarray | TensorInfo]]


def save_model(
    path: str | Path,
    model: "Model",
    params: Params,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    card: Card | None = None,
    force: bool = False,
) -> None:
    """Writes the model as a Hugging Face folder, complete or not at all; adapters are merged into their kernels.

    Packed kernels are unpacked, except those of gpt-oss's experts in MXFP4 if no adapter changes them, which
    transformers opens as they are. Params with a score head are written as a reward model
    (…ForSequenceClassification), which has no head for logits.
    Of a model that also sees or hears, the other parts are copied from the folder that it was loaded from.

    Args:
        shard_bytes: the most bytes of tensors in one file; larger models get several files and an index.
        card: the model card (None: one that says how to open the folder). One that is there and was changed stays.
        force: also replace a model or an adapter that jlora did not write.

    Raises:
        ValueError: `params` are not those of `model`, have a score head that transformers has no class for, or the
            other parts of the model are not where they were.
        FileExistsError: `path` holds something other than a model, or one that jlora did not write.
    """
    model, params = as_written(model, params)
    pieces, others = pieces_of(model, params), _unpacked(beside(model))
    config, generation = configs(model, pieces, tokenizer)
    entries, packing = _entries(model, params, spelled(pieces, others))
    card = card or model_card("model", (), scored=SCORE in params)
    write_folder(path, (config | packing, generation), entries, tokenizer, shard_bytes, card, others, force=force)


def _entries(model: "Model", params: Params, pieces: Sequence[Piece]) -> tuple[list[Entry], dict[str, Any]]:
    """(what to write of the pieces, what config.json says more of it): experts in MXFP4 as they are, all else dense."""
    flat = tree.flatten(params)
    packed = mxfp4.written_packed(model.config.model_type, flat, changed_paths(params))
    _say_unpacked(flat, packed)
    dense = [Entry(piece.nbytes, functools.partial(tensors_of, params, piece)) for piece in pieces]
    if not packed:
        return dense, {}
    entries = [
        Entry(tree.nbytes(flat[piece.path]) // flat[piece.path].shape[0], functools.partial(_packed, flat, piece))
        if piece.path in packed
        else entry
        for piece, entry in zip(pieces, dense, strict=True)
    ]
    kernels = [piece for piece in pieces if re.fullmatch(mxfp4.KERNELS, piece.path)]
    others = {piece.name.rpartition(".")[0] for piece in kernels if piece.path not in packed}
    before = model.config.to_hf().get("quantization_config")
    return entries, {"quantization_config": mxfp4.settings(before, others)}


def _packed(flat: Mapping[str, Any], piece: Piece) -> dict[str, np.ndarray]:
    return mxfp4.packed_tensors(piece.name, jax.tree.map(np.asarray, flat[piece.path][piece.tensor.index]))


def changed_paths(params: Params) -> set[str]:
    """The paths of the base's leaves that the adapter changes."""
    found: set[str] = set()

    def note(path: str, module: Params) -> Params:
        found.update(f"{path}/{name}" for name in changed_leaves(module))
        return module

    tree.map_modules(note, params)
    return found


def _say_unpacked(flat: Mapping[str, Any], packed: Collection[str]) -> None:
    """Warns of experts in MXFP4 that are written in 16 or 32 bits."""
    wide = [leaf for path, leaf in flat.items() if path not in packed and mxfp4.holds_experts(path, leaf)]
    if wide:
        before, after = tree.nbytes(wide), sum(leaf.size * leaf.dtype.itemsize for leaf in wide)
        warnings.warn(
            f"experts in MXFP4 ({size_of(before)}) are written as {wide[0].dtype} ({size_of(after)}): "
            "the adapter changes them, or transformers has no such experts in MXFP4. `jlora merge --quant=mxfp4` packs "
            "gpt-oss's again, and says how much of the update is left",
            stacklevel=4,
        )


def require_writable(model: "Model", params: Params) -> None:
    """Checks, before anything is merged, that the model with its adapter can be written.

    Raises:
        ValueError: as `save_model`.
    """
    model, params = as_written(model, params)
    pieces_of(model, params)
    _unpacked(beside(model))


def spelled(pieces: Sequence[Piece], others: Beside | None) -> list[Piece]:
    """The pieces by the names of the folder that their model was loaded from."""
    if others is None:
        return list(pieces)
    return [piece._replace(tensor=piece.tensor._replace(name=others.name(piece.name))) for piece in pieces]


def _unpacked(others: Beside | None) -> Beside | None:
    """The same. Raises UserError if some of its tensors are packed, which only a packed folder can hold."""
    packed = [name for name in others.tensors if COMPANION.fullmatch(name)] if others else []
    if packed:
        raise UserError(
            f"{others.folder}: parts beside the language model are packed ({packed[0]}, …), and are only copied: "
            "merge into the original model"
        )
    return others


def write_folder(
    path: str | Path,
    configs: tuple[Mapping[str, Any], Mapping[str, Any] | None],
    entries: Sequence[Entry],
    tokenizer: "PreTrainedTokenizerBase | None",
    shard_bytes: int,
    card: Card,
    others: Beside | None = None,
    *,
    force: bool = False,
) -> None:
    """Writes config.json, generation_config.json, the tensors, the tokenizer and the card, complete or not at all.

    Args:
        others: what is copied: tensors, the settings of processors, and the tokenizer if there is no other.
        force: also replace a model or an adapter that jlora did not write.
    """
    if not force:
        require_own(path)
    config, generation = configs
    copied = others.tensors if others else {}
    entries = [*entries, *(Entry(info.nbytes, lambda name=name: {name: copied[name]}) for name, info in copied.items())]
    shards = _shards(entries, shard_bytes)
    stale = STALE if tokenizer is None else STALE + TOKENIZER
    with replacing(path, marker="config.json", stale=stale) as folder:
        _write_json(folder / "config.json", for_every_reader(config))
        if generation:
            _write_json(folder / "generation_config.json", generation)
        weight_map, total = {}, 0
        for name, members in shards.items():
            tensors = {key: value for entry in members for key, value in entry.tensors().items()}
            made = {key: value for key, value in tensors.items() if key not in copied}
            require_finite(made)
            save_shard(folder / name, made, {key: value for key, value in tensors.items() if key in copied})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(value.nbytes for value in tensors.values())
        if len(shards) > 1:
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        if is_as_written(path):  # a README of the user's own stays
            (folder / CARD).write_text(str(card), encoding="utf-8")
        if others:
            others.copy_files(folder, PROCESSOR if tokenizer is not None else PROCESSOR + TOKENIZER)


def as_written(model: "Model", params: Params) -> tuple["Model", Params]:
    """(model, params) as the merged model's files have them, except that adapters are still to be merged leaf by leaf.

    A score head becomes part of the base; embedding and head become two if the adapter makes them differ. The kernels
    of a merge-aware run are merged and packed here: they were trained to be packed with their update.
    """
    if any(map(quant.packs_update, tree.flatten(params).values())):
        params = lora.merge(params)
    params = only_scored(model, params) if SCORE in params else lora.untie(params)
    return untied(model, params), params


def untied(model: "Model", params: Params) -> "Model":
    """The model, with a config that says so if its tied embedding and head have become two."""
    if not model.config.tie_word_embeddings or "kernel" not in params.get(model.config.names.head, {}):
        return model
    return dataclasses.replace(model, config=model.config.with_field("tie_word_embeddings", False))


def pieces_of(model: "Model", params: Params) -> list[Piece]:
    """Every tensor of the folder, sorted by name.

    Raises:
        ValueError: `params` are not those of `model`; all differences are listed.
    """
    kind = model.config.model_type
    leaves = tree.flatten(model.abstract_params(np.float32))
    expected = {
        tensor.name: tensor.shape
        for path, leaf in (scored_leaves(model, leaves, ()) if SCORE in params else leaves).items()
        for tensor in names.hub_tensors(path, leaf.shape, kind)
    }
    pieces, problems = [], []
    for path, leaf in tree.flatten(lora.strip(params)).items():
        try:
            tensors = names.hub_tensors(path, leaf.shape, kind)
        except UserError as error:
            problems.append(str(error))
        else:
            pieces += [Piece(tensor, path, np.dtype(leaf.dtype)) for tensor in tensors]
    problems += _biases_without_base(params)
    found = {piece.name: piece.tensor.shape for piece in pieces}
    problems += [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"unknown {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise UserError("these params do not fit the model:\n  " + "\n  ".join(problems))
    return sorted(pieces)


def _biases_without_base(params: Params) -> list[str]:
    flat = tree.flatten(params)
    modules = [path.rpartition("/")[0] for path in flat if BIAS.holds(path.rpartition("/")[2])]
    return [
        f"{module}: the adapter adds a bias where the model has none"
        for module in modules
        if f"{module}/bias" not in flat
    ]


def _shards(entries: Sequence[Entry], limit: int) -> dict[str, list[Entry]]:
    """File name → its entries; a file has at most `limit` bytes unless a single entry is larger."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def tensors_of(params: Params, piece: Piece, dtype: jax.typing.DTypeLike | None = None) -> dict[str, np.ndarray]:
    """{name: the tensor's values on the host} in the Hub's layout, in `dtype` (None: the leaf's own)."""
    module_path, _, name = piece.path.rpartition("/")
    module, tensor = tree.subtree(params, module_path), piece.tensor
    # The module's other base leaves do not affect this one and need not be fetched.
    wanted = {k: _at(leaf, tensor.index, k) for k, leaf in module.items() if k == name or lora.is_adapter(k)}
    values = np.asarray(lora.merged_leaf(wanted, name, dtype))
    values = values if tensor.columns is None else values[..., slice(*tensor.columns)]
    turned = values.transpose(tensor.order)
    return {piece.name: np.ascontiguousarray(turned).reshape(turned.shape)}  # the first would give a number an axis


def _at(leaf: Any, index: tuple[int, ...], name: str) -> Any:
    """The leaf's entry for one layer (and expert); an adapter's settings have no experts axis."""
    if leaf_of(name) in SETTINGS:
        index = index[:1]
    return leaf[index]


def configs(
    model: "Model", pieces: Sequence[Piece], tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """(config.json, generation_config.json or None)."""
    config = dict(model.config.to_hf())
    generation = config.pop("generation_config", None)
    config.pop("quantization_config", None)
    settings = config | FAMILIES[model.config.model_type].settings(config)
    generation = _generation_config(model, settings, generation, tokenizer)
    config = _with_dtype(model, config, max(pieces, key=lambda piece: piece.nbytes).dtype.name)
    if any(piece.path == KERNEL for piece in pieces):
        config = scored_config(model, config, tokenizer)
    return config, generation


def _with_dtype(model: "Model", config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with this dtype, also for the language model inside."""
    half, outdated = FAMILIES[model.config.model_type].half, ("torch_dtype", "dtype")
    parts = {half.field: config.get(half.field) or {}} if half else {}
    own = {field: {key: part[key] for key in part if key not in outdated} for field, part in parts.items()}
    return {key: config[key] for key in config if key not in outdated} | own | {"dtype": dtype}


def _generation_config(
    model: "Model",
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> Mapping[str, Any] | None:
    """generation_config.json, with every token that ends an answer, including those that only the tokenizer knows.

    A model that was trained on chats ends its answers as their template does, whatever its base ended texts with.
    """
    known = model.config.eos_token_ids
    ends = known if tokenizer is None else end_ids(tokenizer, known, model.config.vocab_size)
    if set(ends) <= set(known):
        return generation
    if generation is None:  # without the file, transformers takes these from config.json
        names_of_tokens = ("bos_token_id", "pad_token_id")
        generation = {name: config[name] for name in names_of_tokens if config.get(name) is not None}
    return {**generation, "eos_token_id": list(ends)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
