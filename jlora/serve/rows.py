"""The rows of a running batch on the device: what is compiled, and nothing that decides.

A row's place in the cache is its token's position: column p holds the token at position p. What earlier users of a row
left beyond its length is written over before any query is at a position that could see it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jlora import lora, sharding
from jlora.generate.sampling import Settings, log_prob, penalized, sample_rows
from jlora.models import Cache, Model
from jlora.types import Params

TOP = 20  # the most alternatives that are told of a token


class Rows(NamedTuple):
    """What the device keeps of B rows between steps.

    Attributes:
        cache: of the tokens read and drawn, the newest of each row not included.
        last: that newest token.
        read: the tokens of each row's prompt; only of rows with penalties.
        drawn: how often each token was drawn since; only of rows with penalties.
    """

    cache: Cache
    last: Int[Array, "B"]
    read: Bool[Array, "B V"]
    drawn: Int[Array, "B V"]


class Turn(NamedTuple):
    """What a step needs to know of each row.

    Attributes:
        active: whether a token is drawn. Other rows are left as they are.
        lengths: how many tokens the cache holds.
        given: the token to go on from; -1 for the one that the row drew last.
        adapters: the number of the row's adapter in the bank; None: the params are no bank's.
        seeds, choices, numbers: what the row's randomness depends on: a seed (its high word first), which of the
            answers to a prompt it is, and how many tokens it has drawn.
        settings: how the token is chosen.
        told: whether some row wants to know what else was likely.
    """

    active: Bool[Any, "B"]
    lengths: Int[Any, "B"]
    given: Int[Any, "B"]
    adapters: Int[Any, "B"] | None
    seeds: UInt32[Any, "B 2"]
    choices: Int[Any, "B"]
    numbers: Int[Any, "B"]
    settings: Settings
    told: Bool[Any, ""]


class Drawn(NamedTuple):
    """A step's tokens; log-probabilities are the model's own, without temperature and penalties, if they are told.

    Attributes:
        top_tokens, top_log_probs: the likeliest ones, from the likeliest.
    """

    tokens: Int[Array, "B"]
    log_probs: Float[Array, "B"]
    top_tokens: Int[Array, "B top"]
    top_log_probs: Float[Array, "B top"]


# The params, of which only a dtype is used, say on which devices the rows are: they are not to be left out.
@functools.partial(sharding.jit, static_argnames=("model", "count", "size"), keep_unused=True)
def empty(model: Model, params: Params, count: int, size: int) -> Rows:
    """Rows that hold nothing, with room for `size` tokens each."""
    zeros, vocabulary = jnp.zeros(count, jnp.int32), (count, model.config.vocab_size)
    cache = dataclasses.replace(model.empty_cache(params, count, size), length=zeros, spread=False)
    return _placed(Rows(cache, zeros, jnp.zeros(vocabulary, bool), jnp.zeros(vocabulary, jnp.int32)))


@functools.partial(sharding.jit, static_argnames=("model",), donate_argnames=("rows",))
def step(model: Model, params: Params, rows: Rows, turn: Turn) -> tuple[Rows, Drawn]:
    """Draws one token in every active row."""
    params = _chosen(params, turn.adapters)
    size = rows.cache.size
    # Whatever is written for other rows falls outside of the cache.
    cache = _until(rows.cache, jnp.where(turn.active, turn.lengths, size))
    tokens = jnp.where(turn.given < 0, rows.last, turn.given)
    positions = jnp.where(turn.active, turn.lengths, 0)
    hidden, cache = model.hidden(
        params,
        tokens[:, None],
        positions[:, None],
        turn.active.astype(jnp.int32)[:, None],
        cache=cache,
        branches=False,
    )
    logits = sharding.constrain(model.logits(params, hidden[:, 0]), None, None)  # what draws sorts whole rows
    keys = jax.random.wrap_key_data(turn.seeds, impl="threefry2x32")
    for number in (turn.choices, turn.numbers):
        keys = jax.vmap(jax.random.fold_in)(keys, number)
    chosen = sample_rows(penalized(logits, rows.read, rows.drawn, turn.settings), keys, turn.settings)
    told = jax.lax.cond(turn.told, _told, _untold, logits, chosen)
    places = jnp.arange(len(chosen), dtype=jnp.int32)
    drawn = rows.drawn.at[places, chosen].add(turn.active.astype(jnp.int32))
    last = jnp.where(turn.active, chosen, rows.last)
    return _placed(Rows(cache, last, rows.read, drawn)), Drawn(chosen, *told)


@functools.partial(sharding.jit, static_argnames=("model",), donate_argnames=("rows",))
def read(
    model: Model,
    params: Params,
    rows: Rows,
    which: Int[Array, "R"],
    tokens: Int[Array, "R C"],
    starts: Int[Array, "R"],
    counts: Int[Array, "R"],
    adapters: Int[Array, "R"] | None,
) -> Rows:
    """Reads a piece of a prompt in some rows.

    Args:
        which: the rows; a number out of range reads nothing.
        tokens, counts: the pieces, padded on the right, and their lengths.
        starts: how many tokens each row holds already.
    """
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    is_real = (columns < counts[:, None]).astype(jnp.int32)
    positions = starts[:, None] + columns
    if model.config.names.positions:  # beyond those that the model has learned there is nothing, not even a number
        positions = jnp.minimum(positions, model.config.max_position_embeddings - 1)
    cache = _until(rows.cache.view(which, starts), starts)
    _, cache = model.hidden(_chosen(params, adapters), tokens, positions, is_real, cache=cache, branches=False)
    return _placed(rows._replace(cache=rows.cache.with_view(cache)))


@functools.partial(sharding.jit, donate_argnames=("rows",))
def copy(rows: Rows, source: Int[Array, ""], target: Int[Array, ""]) -> Rows:
    """The rows with what the cache holds of `source` in `target` too."""
    one = dataclasses.replace(rows.cache.take(source[None]), length=rows.cache.length.at[source[None]].get(mode="clip"))
    return _placed(rows._replace(cache=rows.cache.put(target[None], one)))


@functools.partial(sharding.jit, donate_argnames=("rows",))
def begin(rows: Rows, target: Int[Array, ""], read: Bool[Array, "V"]) -> Rows:
    """The rows with these tokens noted as the prompt's of `target`, and none as drawn there."""
    return _placed(rows._replace(read=rows.read.at[target].set(read), drawn=rows.drawn.at[target].set(0)))


@functools.partial(sharding.jit, static_argnames=("model", "size"))
def resize(model: Model, params: Params, rows: Rows, size: int) -> Rows:
    """The rows with room for `size` tokens each; what does not fit is cut off."""
    shapes = jax.eval_shape(lambda: empty(model, params, len(rows.last), size).cache)

    def fit(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
        kept = old[tuple(map(slice, new.shape))]
        return jnp.pad(kept, [(0, full - own) for own, full in zip(kept.shape, new.shape, strict=True)])

    return _placed(rows._replace(cache=jax.tree.map(fit, rows.cache, shapes)))


def _placed(rows: Rows) -> Rows:
    """The rows as they lie on the mesh in context, after every program: the cache's heads are split, all else whole."""
    cache, *rest = rows
    return Rows(cache.placed(), *(sharding.constrain(leaf, *(None,) * leaf.ndim) for leaf in rest))


def _chosen(params: Params, adapters: jax.Array | None) -> Params:
    """A bank's params with each row's adapter; other params as they are."""
    if adapters is None:
        return params
    return lora.choose(params, adapters[:, None], jnp.ones((len(adapters), 1), jnp.float32))


def _until(cache: Cache, lengths: jax.Array) -> Cache:
    """The cache with nothing beyond these lengths, where the next tokens go."""
    columns = jnp.arange(cache.size, dtype=jnp.int32)[None]
    segment_ids = jnp.where(columns < lengths[:, None], cache.segment_ids, 0)
    return dataclasses.replace(cache, segment_ids=segment_ids, length=lengths)


def _told(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    likeliest, places = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    total = jax.nn.logsumexp(logits, axis=-1)
    return log_prob(logits, tokens, temperature=1.0), places.astype(jnp.int32), likeliest - total[:, None]


def _untold(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape = len(logits), min(TOP, logits.shape[-1])
    return jnp.zeros(shape[0], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
