"""Grouped-query attention with a mask that covers causality, packing, padding and the KV cache alike."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jlora.lora.linear import SAVED
from jlora.types import BRANCH

LOWEST = float(np.finfo(np.float32).min)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "positions", "segment_ids", "length"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of earlier tokens, stacked over layers, with room for S tokens a row.

    Attributes:
        keys, values: [L, B, K, S, F], the order in which attention reads them.
        positions, segment_ids: int32 [B, S]; segment 0 marks what is padding or not written yet.
        length: int32, how many of the S are written: a scalar where that is the same for every row (shorter prompts are
            padded on the left), [B] where rows differ. A row is not to be read once its length has passed S.
    """

    keys: Any
    values: Any
    positions: Any
    segment_ids: Any
    length: Any

    @classmethod
    def empty(cls, layers: int, batch: int, size: int, heads: int, width: int, dtype: jax.typing.DTypeLike) -> "Cache":
        """A cache with nothing written."""
        shape = (layers, batch, heads, size, width)
        marks = jnp.zeros((batch, size), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), marks, marks, jnp.int32(0))

    def mark(self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache that knows of T new tokens, whose keys and values the layers then write at `length`."""

        def write(marks: jax.Array, new: jax.Array) -> jax.Array:
            if self.length.ndim:
                return marks.at[self._places(new.shape[1])].set(new, mode="drop", unique_indices=True)
            return jax.lax.dynamic_update_slice(marks, new, (0, self.length))

        return dataclasses.replace(
            self, positions=write(self.positions, positions), segment_ids=write(self.segment_ids, segment_ids)
        )

    def write(
        self, layer: Int[Array, ""], keys: Float[Array, "B T K F"], values: Float[Array, "B T K F"]
    ) -> tuple["Cache", Float[Array, "B S K F"], Float[Array, "B S K F"]]:
        """The cache with a layer's new keys and values at `length`, and all of that layer's keys and values."""

        def write(stack: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(stack.dtype)
            if self.length.ndim:
                rows, columns = self._places(new.shape[1])
                return stack.at[layer, rows, :, columns].set(new, mode="drop", unique_indices=True)
            new = jnp.swapaxes(new, 1, 2)[None]
            return jax.lax.dynamic_update_slice(stack, new, (layer, 0, 0, self.length, 0))

        def read(stack: jax.Array) -> jax.Array:
            return jnp.swapaxes(jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), 1, 2)

        cache = dataclasses.replace(self, keys=write(self.keys, keys), values=write(self.values, values))
        return cache, read(cache.keys), read(cache.values)

    def put(self, rows: Int[Array, "R"], other: "Cache") -> "Cache":
        """The cache with `rows` begun anew as the rows of `other`, which may be smaller; rows out of range are dropped.

        A cache of one length takes that of `other`: all of its rows are to be put at once.
        """
        size = other.keys.shape[3]
        room = [(0, 0), (0, self.keys.shape[3] - size)]
        length = other.length
        if self.length.ndim:
            length = self.length.at[rows].set(length, mode="drop")
        return Cache(
            self.keys.at[:, rows, :, :size].set(other.keys, mode="drop"),
            self.values.at[:, rows, :, :size].set(other.values, mode="drop"),
            self.positions.at[rows].set(jnp.pad(other.positions, room), mode="drop"),
            self.segment_ids.at[rows].set(jnp.pad(other.segment_ids, room), mode="drop"),
            length,
        )

    def take(self, rows: Int[Array, "R"]) -> "Cache":
        """The cache whose rows are these of this one, which has one length; a row may be taken several times."""
        return dataclasses.replace(
            self,
            keys=self.keys.at[:, rows].get(mode="clip"),
            values=self.values.at[:, rows].get(mode="clip"),
            positions=self.positions.at[rows].get(mode="clip"),
            segment_ids=self.segment_ids.at[rows].get(mode="clip"),
        )

    def _places(self, tokens: int) -> tuple[jax.Array, jax.Array]:
        """(rows [B, 1], columns [B, T]) of the next tokens of every row, where rows differ in length."""
        rows = jnp.arange(len(self.length), dtype=jnp.int32)[:, None]
        return rows, self.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]


def attention_mask(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segment_ids: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Which keys each query may see: those of its own segment, and of the one that it branches off (see `BRANCH`), at
    its own position or fewer than `window` earlier.
    """
    queries, keys = segment_ids[:, :, None], key_segment_ids[:, None, :]
    same = (queries == keys) | (queries % BRANCH == keys)
    distance = positions[:, :, None] - key_positions[:, None, :]
    seen = same & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def attend(
    queries: Float[Array, "B T H F"],
    keys: Float[Array, "B S K F"],
    values: Float[Array, "B S K F"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H F"]:
    """softmax(scale · q·k) @ v with H/K query heads for each key head; scores and softmax in float32.

    Args:
        scale: of the scores, default 1/sqrt(F).
        softcap: scores become softcap · tanh(scores / softcap) (Gemma 2).

    Where T = S, a query must not need keys that come after it in the array: blocks of queries look at the keys up to
    their end.
    """
    batch, tokens, heads, width = queries.shape
    grouped = queries.reshape(batch, tokens, keys.shape[2], heads // keys.shape[2], width).transpose(0, 2, 3, 1, 4)
    scores = _Scores(1 / math.sqrt(width) if scale is None else scale, softcap)
    y = _attend(scores, grouped, jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), mask)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, width)


class _Scores(NamedTuple):
    """How products of queries and keys become scores."""

    scale: float
    softcap: float | None

    def __call__(self, products: jax.Array) -> jax.Array:
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def gradient(self, scores: jax.Array, grad: jax.Array) -> jax.Array:
        """The gradient of the products from that of the scores."""
        if self.softcap is not None:
            grad = grad * (1 - (scores / self.softcap) ** 2)
        return grad * self.scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: _Scores, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, K, G, T, F] from queries [B, K, G, T, F], keys and values [B, K, S, F] and mask [B, T, S]."""
    return _attend_forward(rule, queries, keys, values, mask)[0]


def _attend_forward(
    rule: _Scores, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output, and what the backward pass needs: not the scores, which would be the largest residual."""
    outputs, log_totals = [], []
    for rows, seen in _blocks(mask):
        q = queries[..., rows, :]
        scores = _product("bkmf,bksf->bkms", _rows(q), keys[:, :, seen]).reshape(*q.shape[:-1], -1)
        scores = jnp.where(mask[:, None, None, rows, seen], rule(scores), LOWEST)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        y = _product("bkms,bksf->bkmf", _rows(weights.astype(values.dtype)), values[:, :, seen]).reshape(q.shape)
        outputs.append((y / total).astype(values.dtype))
        log_totals.append((top + jnp.log(total))[..., 0])
    y = checkpoint_name(jnp.concatenate(outputs, axis=3), SAVED)
    return y, (queries, keys, values, mask, y, checkpoint_name(jnp.concatenate(log_totals, axis=3), SAVED))


def _attend_backward(
    rule: _Scores, residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """With the scores as [S, T], in which the products for keys and values need no transpose."""
    queries, keys, values, mask, y, log_totals = residuals
    delta = jnp.sum(grad.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    grad_queries, grad_keys, grad_values = [], 0, 0
    for rows, seen in _blocks(mask):
        q, k, v, g = queries[..., rows, :], keys[:, :, seen], values[:, :, seen], grad[..., rows, :]
        turned = (*k.shape[:3], *q.shape[2:4])  # [B, K, S, G, T]
        scores = rule(_product("bksf,bkmf->bksm", k, _rows(q)).reshape(turned))
        seen_scores = jnp.where(jnp.swapaxes(mask[:, rows, seen], 1, 2)[:, None, :, None], scores, LOWEST)
        weights = jnp.exp(seen_scores - log_totals[:, :, None, :, rows])
        grad_weights = _product("bksf,bkmf->bksm", v, _rows(g)).reshape(turned)
        grad_scores = rule.gradient(scores, weights * (grad_weights - delta[:, :, None, :, rows]))
        weights, grad_scores = (x.astype(q.dtype).reshape(*turned[:3], -1) for x in (weights, grad_scores))
        grad_queries.append(_product("bksm,bksf->bkmf", grad_scores, k).reshape(q.shape))
        later = [(0, 0), (0, 0), (0, keys.shape[2] - k.shape[2]), (0, 0)]
        grad_keys += jnp.pad(_product("bksm,bkmf->bksf", grad_scores, _rows(q)), later)
        grad_values += jnp.pad(_product("bksm,bkmf->bksf", weights, _rows(g)), later)
    grad_queries = jnp.concatenate(grad_queries, axis=3).astype(queries.dtype)
    return grad_queries, grad_keys.astype(keys.dtype), grad_values.astype(values.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _blocks(mask: jax.Array) -> list[tuple[slice, slice]]:
    """Pieces of the queries, each with the keys that it may see, which saves most of the masked half of the scores.

    Up to four pieces of at least 64 queries: the products stay large, and four skip 3/8 of the scores.
    """
    _, tokens, size = mask.shape
    count = max(1, min(4, tokens // 64)) if tokens == size else 1
    edges = [tokens * i // count for i in range(count + 1)]
    return [(slice(i, j), slice(0, j if count > 1 else size)) for i, j in itertools.pairwise(edges)]


def _rows(x: jax.Array) -> jax.Array:
    """[B, K, G, T, X] as [B, K, G·T, X]: products with a single row axis are those that XLA leaves as they are."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
