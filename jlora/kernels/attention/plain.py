"""Attention that forms the scores of a block of queries with all of their keys; this form defines the numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jlora.kernels.attention.marks import Kept, Marks, Scores
from jlora.kernels.order import constant

LOWEST = float(np.finfo(np.float32).min)


def forward(
    rule: Scores, queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks
) -> tuple[jax.Array, jax.Array]:
    """(the output [B, K, G, T, F], the logarithm of each query's sum of weights, float32 [B, K, G, T])."""
    outputs, log_totals = [], []
    for rows, columns in _blocks(marks):
        q = queries[..., rows, :]
        scores = product("bkmf,bksf->bkms", as_rows(q), keys[:, :, columns]).reshape(*q.shape[:-1], -1)
        scores = jnp.where(marks.mask(rows, columns)[:, None, None], rule(scores), constant(LOWEST, q))
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        y = product("bkms,bksf->bkmf", as_rows(weights.astype(values.dtype)), values[:, :, columns]).reshape(q.shape)
        outputs.append((y / total).astype(values.dtype))
        log_totals.append((top + jnp.log(total))[..., 0])
    return jnp.concatenate(outputs, axis=3), jnp.concatenate(log_totals, axis=3)


def backward(rule: Scores, kept: Kept, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values.

    Scores are [S, T], so the products for keys and values need no transpose.
    """
    queries, keys, values, marks, y, log_totals = kept
    delta = jnp.sum(grad.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    grad_queries, grad_keys, grad_values = [], 0, 0
    for rows, columns in _blocks(marks):
        q, k, v, g = queries[..., rows, :], keys[:, :, columns], values[:, :, columns], grad[..., rows, :]
        turned = (*k.shape[:3], *q.shape[2:4])  # [B, K, S, G, T]
        scores = rule(product("bksf,bkmf->bksm", k, as_rows(q)).reshape(turned))
        mask = jnp.swapaxes(marks.mask(rows, columns), 1, 2)[:, None, :, None]
        weights = jnp.exp(jnp.where(mask, scores, constant(LOWEST, q)) - log_totals[:, :, None, :, rows])
        grad_weights = product("bksf,bkmf->bksm", v, as_rows(g)).reshape(turned)
        grad_scores = rule.gradient(scores, weights * (grad_weights - delta[:, :, None, :, rows]))
        weights, grad_scores = (x.astype(q.dtype).reshape(*turned[:3], -1) for x in (weights, grad_scores))
        grad_queries.append(product("bksm,bksf->bkmf", grad_scores, k).reshape(q.shape))
        later = [(0, 0), (0, 0), (0, keys.shape[2] - k.shape[2]), (0, 0)]
        grad_keys += jnp.pad(product("bksm,bkmf->bksf", grad_scores, as_rows(q)), later)
        grad_values += jnp.pad(product("bksm,bkmf->bksf", weights, as_rows(g)), later)
    grad_queries = jnp.concatenate(grad_queries, axis=3).astype(queries.dtype)
    return grad_queries, grad_keys.astype(keys.dtype), grad_values.astype(values.dtype)


def _blocks(marks: Marks) -> list[tuple[slice, slice]]:
    """Pieces of the queries, each with the keys that it may see, to save most of the masked half of the scores.

    Up to four pieces of at least 64 queries: products stay large, and four pieces skip 3/8 of the scores.
    """
    tokens, size = marks.size
    count = max(1, min(4, tokens // 64)) if marks.aligned else 1
    edges = [tokens * i // count for i in range(count + 1)]
    return [(slice(i, j), slice(0, j if count > 1 else size)) for i, j in itertools.pairwise(edges)]


def as_rows(x: jax.Array) -> jax.Array:
    """[B, K, G, T, X] as [B, K, G·T, X]: XLA leaves products with a single row axis as they are."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum with float32 sums."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
