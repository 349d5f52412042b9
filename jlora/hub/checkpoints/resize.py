"""Gives a base more rows for tokens than its checkpoint has; new rows are the mean of the existing ones."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 (numpy's casts to bfloat16)
import numpy as np

from jlora.errors import UserError
from jlora.hub.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from jlora.models import Model

TOKENIZER = "tokenizer"
# A number of rows, "tokenizer" (as many as it needs), or None (as many as there are).
Vocab = int | str | None


def resized(model: "Model", source: str | Path, vocab: Vocab) -> "Model":
    """The model with as many rows for tokens as `vocab` says, also in its config.json.

    Args:
        source: where the tokenizer is. With vocab="tokenizer" there are as many rows as it has ids, but never fewer
            than before: many models have spare rows.

    Raises:
        UserError: `vocab` is invalid, or fewer rows than the model has.
    """
    rows = model.config.vocab_size
    check_vocab(vocab, "vocab")
    if vocab is None:
        return model
    wanted = vocab
    if vocab == TOKENIZER:
        wanted = max(rows, 1 + max(load_tokenizer(source).get_vocab().values(), default=-1))
    if wanted < rows:
        raise UserError(f"vocab={wanted}: {source} has {rows} rows for tokens, and rows are never removed")
    if wanted == rows:
        return model
    config = model.config.with_field("vocab_size", wanted)
    if config.hidden_size_per_layer_input:
        own = max(wanted, config.vocab_size_per_layer_input)
        config = config.with_field("vocab_size_per_layer_input", own)
    return dataclasses.replace(model, config=config)


def check_vocab(vocab: Vocab, name: str) -> None:
    """Raises UserError unless `vocab` is a number of rows, "tokenizer" or None; `name` is the user's name for it."""
    if vocab not in (None, TOKENIZER) and (isinstance(vocab, bool) or not isinstance(vocab, int) or vocab < 1):
        raise UserError(f"{name}: found {vocab!r}, expected a number of rows, {TOKENIZER!r}, or None")


def grown(read: Callable[[str], Any], names: Collection[str], rows: int) -> Callable[[str], Any]:
    """`read`, with the tensors of these names (embeddings and head, [V, D]) grown to at least this many rows.

    New rows are the mean of the others. transformers' `resize_token_embeddings` draws them closely around it; here they
    are not random, so that a resumed run has the base that it started with.
    """

    def read_grown(name: str) -> Any:
        values = read(name)
        if name not in names or len(values) >= rows:
            return values
        mean = values.mean(axis=0, dtype=np.float64).astype(values.dtype)
        return np.concatenate([values, np.broadcast_to(mean, (rows - len(values), *mean.shape))])

    return read_grown
