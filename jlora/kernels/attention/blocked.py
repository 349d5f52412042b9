"""Attention block by block with a running maximum, forward and backward: memory linear in the length, on any device.

Only the scores of one block of queries with one block of keys exist at a time (online softmax, Milakov and Gimelshein
2018; Rabe and Staats 2021; the backward pass of FlashAttention, Dao et al. 2022).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jlora.kernels.attention.marks import Kept, Marks, Scores, seen
from jlora.kernels.attention.plain import LOWEST, as_rows, product
from jlora.kernels.order import constant

# The most scores of a block (unless it is at its narrowest), and the fewest queries or keys of one.
SCORES = 1 << 24
NARROWEST = 128


def forward(
    rule: Scores, queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks
) -> tuple[jax.Array, jax.Array]:
    """(the output [B, K, G, T, F], the logarithm of each query's sum of weights, float32 [B, K, G, T])."""
    grid, (queries, keys, values, marks) = _prepare(queries, keys, values, marks)

    def block(carry: tuple, pair: tuple) -> tuple[tuple, None]:
        i, j, first = pair
        q, k, v = grid.rows(queries, i), grid.columns(keys, j), grid.columns(values, j)
        y, top, total, outputs, log_totals = carry
        lowest = constant(LOWEST, q)
        scores = product("bkmf,bksf->bkms", as_rows(q), k).reshape(*q.shape[:-1], -1)
        scores = jnp.where(grid.mask(marks, i, j)[:, None, None], rule(scores), lowest)
        before = jnp.where(first, lowest, top)
        top = jnp.maximum(before, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - top[..., None])
        kept = jnp.where(first, constant(0.0, q), jnp.exp(before - top))
        new = product("bkms,bksf->bkmf", as_rows(weights.astype(v.dtype)), v).reshape(q.shape)
        y, total = y * kept[..., None] + new, total * kept + jnp.sum(weights, axis=-1)
        # Written after every block of keys; the last write is the result.
        outputs = grid.put(outputs, (y / total[..., None]).astype(outputs.dtype), i)
        log_totals = grid.put(log_totals, top + jnp.log(total), i)
        return (y, top, total, outputs, log_totals), None

    shape = (*queries.shape[:3], grid.height)
    zeros = _zeros(queries)
    start = (
        zeros((*shape, queries.shape[-1]), jnp.float32),
        *(zeros(shape, jnp.float32),) * 2,
        zeros(queries.shape, values.dtype),
        zeros(queries.shape[:-1], jnp.float32),
    )
    (*_, outputs, log_totals), _ = jax.lax.scan(block, start, grid.pairs())
    return outputs[..., : grid.tokens, :], log_totals[..., : grid.tokens]


def backward(rule: Scores, kept: Kept, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values; sums over blocks are float32."""
    queries, keys, values, marks, y, log_totals = kept
    delta = jnp.sum(grad.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    size, grads = keys.shape[2], (queries.dtype, keys.dtype, values.dtype)
    grid, (queries, keys, values, marks) = _prepare(queries, keys, values, marks)
    grad, delta, log_totals = (grid.padded(x, 3) for x in (grad, delta, log_totals))

    def block(carry: tuple, pair: tuple) -> tuple[tuple, None]:
        i, j, first = pair
        grad_q, grad_queries, grad_keys, grad_values = carry
        q, g = grid.rows(queries, i), grid.rows(grad, i)
        k, v = grid.columns(keys, j), grid.columns(values, j)
        turned = (*k.shape[:3], *q.shape[2:4])  # [B, K, S, G, T]
        scores = rule(product("bksf,bkmf->bksm", k, as_rows(q)).reshape(turned))
        mask = jnp.swapaxes(grid.mask(marks, i, j), 1, 2)[:, None, :, None]
        weights = jnp.exp(jnp.where(mask, scores, constant(LOWEST, q)) - grid.rows(log_totals, i)[:, :, None])
        grad_weights = product("bksf,bkmf->bksm", v, as_rows(g)).reshape(turned)
        grad_scores = rule.gradient(scores, weights * (grad_weights - grid.rows(delta, i)[:, :, None]))
        weights, grad_scores = (x.astype(q.dtype).reshape(*turned[:3], -1) for x in (weights, grad_scores))
        grad_q = jnp.where(first, constant(0.0, q), grad_q)
        grad_q = grad_q + product("bksm,bksf->bkmf", grad_scores, k).reshape(q.shape)
        grad_queries = grid.put(grad_queries, grad_q.astype(grad_queries.dtype), i)
        grad_keys = grid.add(grad_keys, product("bksm,bkmf->bksf", grad_scores, as_rows(q)), j)
        grad_values = grid.add(grad_values, product("bksm,bkmf->bksf", weights, as_rows(g)), j)
        return (grad_q, grad_queries, grad_keys, grad_values), None

    zeros = _zeros(grad)
    start = (
        zeros((*queries.shape[:3], grid.height, queries.shape[-1]), jnp.float32),
        zeros(queries.shape, grads[0]),
        *(zeros(keys.shape, jnp.float32),) * 2,
    )
    (_, grad_queries, grad_keys, grad_values), _ = jax.lax.scan(block, start, grid.pairs())
    return (
        grad_queries[..., : grid.tokens, :],
        grad_keys[:, :, :size].astype(grads[1]),
        grad_values[:, :, :size].astype(grads[2]),
    )


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Blocks of `height` queries by `width` keys that cover `tokens` queries and `size` keys.

    Queries are [B, K, G, T, …], keys [B, K, S, …], both padded to whole blocks.
    """

    tokens: int
    size: int
    height: int
    width: int
    aligned: bool

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(block of queries, block of keys, whether it is the queries' first) of every pair that may be needed."""
        down, across = -(-self.tokens // self.height), -(-self.size // self.width)
        found = [
            (i, j, j == 0)
            for i in range(down)
            for j in range(across)
            if not self.aligned or j * self.width < (i + 1) * self.height
        ]
        i, j, first = (np.array(column) for column in zip(*found, strict=True))
        return i.astype(np.int32), j.astype(np.int32), first

    def rows(self, x: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.height, self.height, axis=3)

    def columns(self, x: jax.Array, j: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.width, self.width, axis=2)

    def put(self, x: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, i * self.height, axis=3)

    def add(self, x: jax.Array, new: jax.Array, j: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, self.columns(x, j) + new, j * self.width, axis=2)

    def mask(self, marks: Marks, i: jax.Array, j: jax.Array) -> jax.Array:
        """bool [B, height, width]."""

        def cut(x: jax.Array, index: jax.Array, length: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, index * length, length, axis=1)

        queries = cut(marks.positions, i, self.height), cut(marks.segment_ids, i, self.height)
        keys = cut(marks.key_positions, j, self.width), cut(marks.key_segment_ids, j, self.width)
        return seen(queries, keys, marks.limit)

    def padded(self, x: jax.Array, axis: int) -> jax.Array:
        """x padded to whole blocks of queries along `axis` (3, or 1 for marks)."""
        return _pad(x, axis, -self.tokens % self.height, 0)


def _prepare(
    queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks
) -> tuple[_Grid, tuple[jax.Array, jax.Array, jax.Array, Marks]]:
    """(the grid, everything padded to whole blocks); padded keys are in no segment."""
    tokens, size = marks.size
    many = math.prod(queries.shape[:3])
    side = 1 << max(0, int(math.log2(max(1, SCORES // many)))) // 2
    side = max(NARROWEST, side)
    height, width = min(side, tokens), min(side, size)
    grid = _Grid(tokens, size, height, width, marks.aligned)
    more_keys = -size % width
    marks = dataclasses.replace(
        marks,
        positions=grid.padded(marks.positions, 1),
        segment_ids=grid.padded(marks.segment_ids, 1),
        key_positions=_pad(marks.key_positions, 1, more_keys, 0),
        key_segment_ids=_pad(marks.key_segment_ids, 1, more_keys, -1),
    )
    keys, values = (_pad(x, 2, more_keys, 0) for x in (keys, values))
    return grid, (grid.padded(queries, 3), keys, values, marks)


def _zeros(x: jax.Array) -> Callable[[tuple[int, ...], jnp.dtype], jax.Array]:
    """A function that makes zeros, but not before x is ready."""
    zero = constant(0.0, x)
    return lambda shape, dtype: jnp.broadcast_to(zero.astype(dtype), shape)


def _pad(x: jax.Array, axis: int, count: int, value: int) -> jax.Array:
    if not count:
        return x
    room = [(0, 0)] * x.ndim
    room[axis] = (0, count)
    return jnp.pad(x, room, constant_values=value)
