"""Whether head and embedding are one: what a safetensors checkpoint holds decides, as in transformers 5."""

import warnings
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jlora import models
from jlora.errors import UserError
from jlora.hub import names
from jlora.hub.weights import DTYPES, SafetensorsFolder

OF_OTHERS = ("lm_head", "embed_tokens")  # of models that jlora does not compute


class Pair(NamedTuple):
    """The tensors of a model's head and embedding.

    Attributes:
        head, embedding: the names in the file; None where it has no such tensor.
        expected: the model's name of the embedding.
    """

    head: str | None
    embedding: str | None
    expected: str


def settle_head(checkpoint: SafetensorsFolder) -> SafetensorsFolder:
    """The checkpoint of a model whose config ties head and embedding, with the one tensor or the two that it has.

    Both, and equal: the head is left out. Both, and not equal: they are not tied, which config.json is corrected to
    say. The head alone: it is the embedding.
    """
    pair = _tied_pair(checkpoint)
    if pair is None or pair.head is None:
        return checkpoint
    if pair.embedding is None:
        checkpoint.rename({pair.expected: pair.head})
    elif _equal(checkpoint, pair.head, pair.embedding):
        checkpoint.tensors.pop(pair.head)
    else:
        warnings.warn(
            f"{checkpoint.folder}: config.json ties head and embedding, but {pair.head} differs from {pair.embedding}; "
            "both are read, as in transformers 5 (version 4 drops the head). "
            'Say "tie_word_embeddings": false in config.json, or delete the head if it is left over',
            stacklevel=3,
        )
        checkpoint.config["tie_word_embeddings"] = False
    return checkpoint


def _tied_pair(checkpoint: SafetensorsFolder) -> Pair | None:
    """Head and embedding, if config.json or the family's default ties them; None if not."""
    modules = OF_OTHERS
    tied = checkpoint.config.get("tie_word_embeddings") is True
    try:
        config = models.build(checkpoint.config).config
    except UserError:  # said where the model is built; `jlora merge --recipe` takes others
        pass
    else:
        modules, tied = (config.names.head, config.names.embedding), config.tie_word_embeddings
    if not tied:
        return None
    head, embedding = (f"{names.module_names(module, 1)[0]}.weight" for module in modules)
    stored = names.without_prefix([embedding], checkpoint.tensors).get(embedding, embedding)
    there = checkpoint.tensors
    return Pair(head if head in there else None, stored if stored in there else None, embedding)


def _equal(checkpoint: SafetensorsFolder, head: str, embedding: str) -> bool:
    """Whether both hold the same values, rounded to the narrower of their two dtypes."""
    infos = [checkpoint.tensors[name] for name in (head, embedding)]
    if infos[0].shape != infos[1].shape or any(info.dtype not in DTYPES for info in infos):
        return False
    one, other = checkpoint.read(head), checkpoint.read(embedding)
    if one.dtype == other.dtype and one.tobytes() == other.tobytes():
        return True
    narrow = min(one.dtype, other.dtype, key=lambda dtype: (dtype.itemsize, ml_dtypes.finfo(dtype).nmant))
    with np.errstate(over="ignore"):
        return bool(np.array_equal(one.astype(narrow), other.astype(narrow)))
