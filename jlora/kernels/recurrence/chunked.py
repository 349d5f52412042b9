"""The recurrence in chunks of tokens: matrix products within chunks, and a loop over chunks that carries the state.

The products of a chunk's corrections follow Yang et al. 2024 (Gated Delta Networks): a triangular system for each chunk
says what every token writes, given the state before the chunk. Chunks are taken in groups; the backward pass keeps the
state before each group and computes a group's inner values again, so that memory grows with the length as the inputs
do.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora import sharding
from jlora.kernels.recurrence.runs import Runs
from jlora.types import SAVED

CHUNK = 64
# The most values of a kind, such as a token's row in a chunk's matrix, that a group of chunks has on one device.
GROUP = 1 << 22
SMALL = 16  # triangular matrices up to this size are inverted by doubling


class _Chunks(NamedTuple):
    """Inputs in chunks: each array begins with [N, B], N chunks of C tokens.

    Attributes:
        queries, keys: [N, B, K, C, F].
        values: [N, B, K, G, C, V].
        decays, rates: [N, B, K, G, C], float32.
        run, trunk: int32 [N, B, C].
        branch: bool [N, B, C].
        entries: int32 [N, B, 2]: the run of the last token before the chunk, and of the last that is no branch.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    decays: jax.Array
    rates: jax.Array | None
    run: jax.Array
    trunk: jax.Array
    branch: jax.Array
    entries: jax.Array


def forward(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    decays: jax.Array,
    rates: jax.Array | None,
    runs: Runs,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `plain.forward`, with cost and memory that grow linearly with the number of tokens."""
    batch, tokens, heads, groups, width = values.shape
    size = min(CHUNK, max(SMALL, 1 << (tokens - 1).bit_length()))
    count = -(-tokens // size)
    per_group = max(1, GROUP // (_on_device(batch, heads * groups) * size * max(size, width)))
    turns = -(-count // per_group)
    per_group = -(-count // turns)
    chunks = _cut(queries, keys, values, decays, rates, runs, (turns, per_group, size))

    # Where there are branches, the second state is the one that they start from.
    states = (state,) * (2 if runs.branches else 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def group(states: tuple[jax.Array, ...], chunks: _Chunks) -> tuple[tuple[jax.Array, ...], jax.Array]:
        return _group(states, chunks)

    def turn(states: tuple[jax.Array, ...], chunks: _Chunks) -> tuple[tuple[jax.Array, ...], jax.Array]:
        return group(tuple(checkpoint_name(state, SAVED) for state in states), chunks)

    states, y = jax.lax.scan(turn, states, chunks)
    y = y.reshape(turns * per_group, *y.shape[2:])  # [N, B, K, G, C, V]
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, groups, width)
    return y[:, :tokens], states[0]


def _on_device(batch: int, heads: int) -> int:
    """How many heads of rows one device has."""
    ways = sharding.ways(*sharding.split(batch, sharding.ROWS), *sharding.split(heads, sharding.HEADS))
    return max(1, batch * heads // ways)


def _cut(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    decays: jax.Array,
    rates: jax.Array | None,
    runs: Runs,
    shape: tuple[int, int, int],
) -> _Chunks:
    """The chunks, in groups: each array begins with [turns, N, B]."""
    turns, per_group, size = shape
    total = turns * per_group * size
    batch, tokens = runs.run.shape
    # The runs before each chunk: they rise along the row, so the last is the largest.
    stems = jnp.where(runs.branch, 0, runs.run)
    latest = [jnp.pad(jax.lax.cummax(x, axis=1), [(0, 0), (1, 0)], constant_values=1) for x in (runs.run, stems)]
    starts = jnp.minimum(jnp.arange(turns * per_group) * size, tokens)
    entries = jnp.maximum(jnp.stack([x[:, starts] for x in latest], axis=-1), 1)
    runs = runs.padded(total)

    def cut(x: jax.Array, *order: int) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, total - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(batch, turns, per_group, size, *x.shape[2:])
        return x.transpose(1, 2, 0, *order)

    return _Chunks(
        cut(queries, 4, 3, 5),
        cut(keys, 4, 3, 5),
        cut(values, 4, 5, 3, 6),
        cut(decays.astype(jnp.float32), 4, 5, 3),
        None if rates is None else cut(rates.astype(jnp.float32), 4, 5, 3),
        cut(runs.run, 3),
        cut(runs.trunk, 3),
        cut(runs.branch, 3),
        entries.reshape(batch, turns, per_group, 2).transpose(1, 2, 0, 3),
    )


def _group(states: tuple[jax.Array, ...], chunks: _Chunks) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(the states after N chunks, the output [N, B, K, G, C, V]): all at once what does not depend on the states."""
    product = functools.partial(_product, chunks.values.dtype)
    queries, keys, values = (x.astype(jnp.float32) for x in (chunks.queries, chunks.keys, chunks.values))
    sees = _sees(chunks, len(states) == 2)
    # Sums over the tokens of one document, not differences of sums over several: what others hold changes no bit.
    logs = _exact("nbij,nbkgj->nbkgi", sees.astype(jnp.float32), chunks.decays)
    decays = _masked_exp(logs[..., :, None] - logs[..., None, :], sees[:, :, None, None])
    seen = product("nbkif,nbkjf->nbkij", queries, keys)[:, :, :, None] * decays
    roots = _roots(chunks, len(states) == 2)
    fades = [_masked_exp(logs, root[:, :, None, None])[..., None] for root in roots]
    writes, known = values, []
    if chunks.rates is not None:
        overlaps = product("nbkif,nbkjf->nbkij", keys, keys)[:, :, :, None] * decays * chunks.rates[..., None]
        solved = inverse(jnp.tril(overlaps, -1)) * chunks.rates[..., None, :]
        writes = product("nbkgij,nbkgjv->nbkgiv", solved, values)
        known = [product("nbkgij,nbkgjf->nbkgif", solved, keys[:, :, :, None] * fade) for fade in fades]
    leaves = _leaves(chunks, sees, roots, logs)

    def step(states: tuple[jax.Array, ...], chunk: tuple) -> tuple[tuple[jax.Array, ...], tuple]:
        queries, fades, known, writes, keys, leaves = chunk
        # Heads share queries and keys: what differs between heads is applied to what has their values' width.
        read = sum(
            fade * product("bkif,bkgfv->bkgiv", queries, state) for fade, state in zip(fades, states, strict=True)
        )
        if chunks.rates is not None:
            writes -= sum(product("bkgif,bkgfv->bkgiv", *pair) for pair in zip(known, states, strict=True))
        after = []
        for leaf in leaves:
            kept = sum(keep * state for keep, state in zip(leaf.kept, states, strict=True))
            after.append(kept + product("bkif,bkgiv->bkgfv", keys, leaf.written[..., None] * writes))
        return tuple(after), (read, writes)

    states, (read, writes) = jax.lax.scan(step, states, (queries, fades, known, writes, keys, leaves))
    return states, read + product("nbkgij,nbkgjv->nbkgiv", seen, writes)


class _Leaving(NamedTuple):
    """What is left of the states, and of what each token writes, at one token of each chunk.

    Attributes:
        kept: [N, B, K, G, 1, 1] for each state.
        written: [N, B, K, G, C].
    """

    kept: tuple[jax.Array, ...]
    written: jax.Array


def _leaves(chunks: _Chunks, sees: jax.Array, roots: list[jax.Array], logs: jax.Array) -> list[_Leaving]:
    """For each state, how it follows from those before: the state after the last token, or after that of a trunk."""
    found = []
    for index in range(len(roots)):
        counts = (chunks.run > 0) & ~(chunks.branch & (index == 1))
        places = jnp.arange(counts.shape[-1])[None, None]
        last = places == jnp.max(jnp.where(counts, places, -1), axis=-1, keepdims=True)
        log = jnp.sum(jnp.where(last[:, :, None, None], logs, 0), axis=-1, keepdims=True)
        written = _masked_exp(log - logs, jnp.any(last[..., None] & sees, axis=-2)[:, :, None, None])
        kept = []
        for other, root in enumerate(roots):
            stays = jnp.any(last & root, axis=-1) | (~jnp.any(last, axis=-1) & (other == index))
            kept.append(_masked_exp(log, stays[:, :, None, None, None])[..., None])
        found.append(_Leaving(tuple(kept), written))
    return found


def _sees(chunks: _Chunks, branches: bool) -> jax.Array:
    """bool [N, B, C, C]: whether a token's document has another token of the chunk, at or before it."""
    run = chunks.run
    same = run[..., :, None] == run[..., None, :]
    if branches:
        same |= chunks.trunk[..., :, None] == run[..., None, :]
    return jnp.tril(same & (run > 0)[..., None, :])


def _roots(chunks: _Chunks, branches: bool) -> list[jax.Array]:
    """bool [N, B, C] for each state before the chunk: whether a token's document continues from it."""
    last, stem = chunks.entries[..., :1], chunks.entries[..., 1:]
    here = chunks.run == last
    if not branches:
        return [here]
    # A trunk that goes on in the chunk is the last run; one that ended before it, and is not, is the second state.
    here |= chunks.trunk == last
    return [here, (chunks.trunk == stem) & ~here]


@jax.custom_vjp
def inverse(lower: jax.Array) -> jax.Array:
    """The inverse of 1 + lower, for strictly lower triangular matrices [..., C, C]; C is a power of two.

    By halves, so that no power of the matrix is formed: with equal keys, powers have entries of 1e18 that cancel.
    """
    size = lower.shape[-1]
    if size <= SMALL:
        return _inverse_by_doubling(lower)
    half = size // 2
    ends = inverse(jnp.stack([lower[..., :half, :half], lower[..., half:, half:]]))
    corner = -_exact("...ij,...jk->...ik", _exact("...ij,...jk->...ik", ends[1], lower[..., half:, :half]), ends[0])
    top = jnp.concatenate([ends[0], jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, ends[1]], axis=-1)], axis=-2)


def _inverse_by_doubling(lower: jax.Array) -> jax.Array:
    """From the inverses of blocks on the diagonal, those of blocks twice as large, until there is only one."""
    size = lower.shape[-1]
    place = jnp.arange(size)
    found = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    block = 1
    while block < size:
        pair, second = place // (2 * block), (place // block) % 2
        corner = (pair[:, None] == pair[None]) & (second[:, None] == 1) & (second[None] == 0)
        new = jnp.where(jnp.broadcast_to(corner, lower.shape), lower, 0)
        if block > 1:  # before, the blocks are ones
            new = _exact("...ij,...jk->...ik", _exact("...ij,...jk->...ik", found, new), found)
        found, block = found - new, 2 * block
    return found


def _inverse_forward(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = inverse(lower)
    return found, found


def _inverse_backward(found: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    product = _exact("...ji,...jk->...ik", found, grad)
    return (-jnp.tril(_exact("...ij,...kj->...ik", product, found), -1),)


inverse.defvjp(_inverse_forward, _inverse_backward)


def _masked_exp(logs: jax.Array, mask: jax.Array) -> jax.Array:
    """exp(logs) where the mask holds, else 0: nothing overflows, in gradients neither."""
    return jnp.where(mask, jnp.exp(jnp.where(mask, logs, 0)), 0)


def _product(dtype: jax.typing.DTypeLike, spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum of float32 arrays, with as many bits of them as inputs of this dtype are worth."""
    return jnp.einsum(spec, left, right, precision="highest" if dtype == jnp.float32 else None)


def _exact(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(spec, left, right, precision="highest")
