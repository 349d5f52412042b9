"""Decides whether head and embedding are tied by what a safetensors checkpoint holds, as transformers 5 does."""

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora import models
from jlora.errors import UserError
from jlora.families import FAMILIES
from jlora.families.family import Names
from jlora.families.multimodal import TIED
from jlora.hub.checkpoints import names
from jlora.hub.checkpoints.weights import DTYPES, SafetensorsFolder, TensorInfo, read_blocks

OF_OTHERS = (Names().head, Names().embedding)  # head and embedding of models that jlora does not compute
BLOCK = 1 << 20  # how many values of each of the two are held at once


class Pair(NamedTuple):
    """The tensors of a model's head and embedding.

    Attributes:
        head, embedding: their names in the file; None if it has no such tensor.
        expected: the model's name for the embedding.
    """

    head: str | None
    embedding: str | None
    expected: str


def settle_head(checkpoint: SafetensorsFolder) -> SafetensorsFolder:
    """The checkpoint, changed to what it holds if its config ties head and embedding.

    If it has both and they are equal, the head is dropped; if they differ, the config is changed to say that they are
    not tied. If it has only the head, that becomes the embedding.
    """
    pair = _tied_pair(checkpoint)
    if pair is None or pair.head is None:
        return checkpoint
    if pair.embedding is None:
        checkpoint.rename({pair.expected: pair.head})
    elif _is_copy(checkpoint, pair):
        checkpoint.tensors.pop(pair.head)
    else:
        checkpoint.config |= _untied(checkpoint.config)
    return checkpoint


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    family = FAMILIES.get(str(config.get("model_type")))
    return family.with_field(config, TIED, False) if family else {**config, TIED: False}


def _tied_pair(checkpoint: SafetensorsFolder) -> Pair | None:
    """Head and embedding if config.json or the family's default ties them, else None."""
    modules = OF_OTHERS
    tied = checkpoint.config.get(TIED) is True
    try:
        config = models.build(checkpoint.config).config
    except UserError:  # reported when the model is built; `jlora merge --recipe` accepts models that jlora cannot build
        pass
    else:
        modules, tied = (config.names.head, config.names.embedding), config.tie_word_embeddings
    if not tied:
        return None
    head, embedding = (f"{names.module_names(module, 1)[0]}.weight" for module in modules)
    stored = names.without_prefix([embedding], checkpoint.tensors).get(embedding, embedding)
    there = checkpoint.tensors
    return Pair(head if head in there else None, stored if stored in there else None, embedding)


def _is_copy(checkpoint: SafetensorsFolder, pair: Pair) -> bool:
    """Whether the head repeats the embedding; warns if not."""
    infos = [checkpoint.tensors[name] for name in (pair.head, pair.embedding)]
    tensors = [_Stored(name, info, _identity(info.file)) for name, info in zip(pair, infos, strict=False)]
    return _compare(checkpoint.folder, *tensors)


class _Stored(NamedTuple):
    """A tensor in a file, with what tells the file from one written later in its place."""

    name: str
    info: TensorInfo
    identity: tuple[int, ...]


def _identity(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@functools.lru_cache(
    maxsize=64
)  # a command opens its model several times; the two are read, and the warning given, only once
def _compare(folder: Path, head: _Stored, embedding: _Stored) -> bool:
    if _equal(head, embedding):
        return True
    warnings.warn(
        f"{folder}: config.json ties head and embedding, but {head.name} differs from {embedding.name}; "
        "both are read, as in transformers 5 (version 4 drops the head). "
        'Say "tie_word_embeddings": false in config.json, or delete the head if it is left over',
        stacklevel=5,
    )
    return False


def _equal(head: _Stored, embedding: _Stored) -> bool:
    """Whether both hold the same values, rounded to the narrower of their two dtypes.

    They are read in blocks of rows, up to the first difference.
    """
    infos = [head.info, embedding.info]
    if infos[0].shape != infos[1].shape or not infos[0].shape or any(info.dtype not in DTYPES for info in infos):
        return False
    dtypes = [DTYPES[info.dtype] for info in infos]
    narrow = min(dtypes, key=lambda dtype: (dtype.itemsize, ml_dtypes.finfo(dtype).nmant))
    blocks = (read_blocks(tensor.info.file, tensor.info.stored or tensor.name, BLOCK) for tensor in (head, embedding))
    return all(_same(one, other, narrow) for one, other in zip(*blocks, strict=True))


def _same(one: np.ndarray, other: np.ndarray, narrow: np.dtype) -> bool:
    if one.dtype == other.dtype and one.tobytes() == other.tobytes():
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        one, other = one.astype(narrow), other.astype(narrow)
    return bool(np.all((one == other) | (np.isnan(one) & np.isnan(other))))  # NaN is refused when it is read
