"""How much a change of weights changes a model's predictions, as their KL divergence."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data, quant, sharding, tree
from jlora.models import Model
from jlora.models.model import SCORE
from jlora.types import Params

LONGEST = 4096


def measure(
    model: Model,
    params: Params,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    config: quant.QuantConfig,
    *,
    count: int = 4,
    seq_len: int = 128,
) -> dict[str, float]:
    """KL(unpacked ‖ this kernel alone packed) by candidate's name, in nats: the mean over tokens of the first records.

    It takes one forward pass for each kernel of each layer, over the last `seq_len` tokens of the first `count` records
    (their first tokens are often the same).

    Args:
        params: of an unpacked model.
        config: the formats to measure; see `jlora.quant.choose` for what to do with the result.
    """
    rows = _rows(model, tokenizer, records[:count], seq_len)
    expected = _log_probabilities(model, params, rows)
    damage = {}
    for found in quant.candidates(params, config):
        divergence = _divergence(
            model, params, rows, expected, jnp.int32(found.index), found.path, found.format, config.double_quant
        )
        damage[found.name] = float(divergence)
    return damage


def divergence(
    model: Model,
    params: Params,
    changed: Params,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    *,
    count: int = 8,
    seq_len: int = 128,
) -> float:
    """KL(params ‖ changed) in nats, the mean over the last `seq_len` tokens of the first `count` records.

    It compares next-token distributions or, for a reward model, its preference σ(score) over an answer of reward 0 at
    every token (Bradley and Terry 1952).
    """
    rows = _rows(model, tokenizer, records[:count], seq_len)
    expected, found = (_log_probabilities(model, which, rows) for which in (params, changed))
    return float(_mean_divergence(expected, found, rows))


def _rows(model: Model, tokenizer: Any, records: Sequence[dict[str, Any]], seq_len: int) -> dict[str, jax.Array]:
    """The last tokens of each record, [B, T], and segment ids that are 0 for padding.

    T is the smaller of `seq_len` and the model's positions.
    """
    seq_len = min(seq_len, model.config.max_position_embeddings)
    tokenizer = data.fitted(tokenizer, model.config.vocab_size)
    examples, _ = data.encode(records, tokenizer, seq_len=LONGEST, overlong="cut")
    tokens = np.zeros((len(examples), seq_len), np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, example in enumerate(examples):
        tail = np.asarray(example.tokens)[-seq_len:]
        tokens[row, : len(tail)], segment_ids[row, : len(tail)] = tail, 1
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segment_ids)}


@functools.partial(sharding.jit, static_argnames=("model", "path", "format", "double_quant"))
def _divergence(
    model: Model,
    params: Params,
    rows: dict[str, jax.Array],
    expected: jax.Array,
    index: jax.Array,
    path: str,
    format: str,
    double_quant: bool,
) -> jax.Array:
    flat = tree.flatten(params)
    kernel = jax.lax.dynamic_index_in_dim(flat[path], index, keepdims=False)
    packed = quant.dequantize(quant.quantize(kernel, format, double_quant=double_quant))
    changed = jax.lax.dynamic_update_index_in_dim(flat[path], packed, index, 0)
    found = _log_probabilities(model, tree.unflatten({**flat, path: changed}), rows)
    return _mean_divergence(expected, found, rows)


def _mean_divergence(expected: jax.Array, found: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
    divergence = jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)
    real = rows["segment_ids"] > 0
    return jnp.sum(jnp.where(real, divergence, 0)) / jnp.sum(real)


@functools.partial(sharding.jit, static_argnums=0)
def _log_probabilities(model: Model, params: Params, rows: dict[str, jax.Array]) -> jax.Array:
    hidden, _ = model.hidden(params, rows["tokens"], segment_ids=rows["segment_ids"], branches=False)
    if SCORE in params:
        scores = model.score(params, hidden)
        return jnp.stack([jax.nn.log_sigmoid(scores), jax.nn.log_sigmoid(-scores)], axis=-1)
    return jax.nn.log_softmax(model.logits(params, hidden), axis=-1)
