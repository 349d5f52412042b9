"""attend against the formula written out: values and gradients, with blocks of queries and without."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.attention import attend, attention_mask
from jlora.types import BRANCH


def plain(queries, keys, values, mask):
    groups = queries.shape[2] // keys.shape[2]
    keys, values = jnp.repeat(keys, groups, axis=2), jnp.repeat(values, groups, axis=2)
    scores = jnp.einsum("bthf,bshf->bhts", queries, keys) / math.sqrt(queries.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshf->bthf", weights, values)


def arrays(tokens, size, heads=6, kv_heads=3, width=10):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [
        (2, tokens, heads, width),
        (2, size, kv_heads, width),
        (2, size, kv_heads, width),
        (2, tokens, heads, width),
    ]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def packed(tokens):
    """Positions and segments of rows that hold two documents and, in the second row, padding."""
    index = np.broadcast_to(np.arange(tokens), (2, tokens))
    segments = np.where(index < tokens // 3, 1, 2)
    segments[1, -5:] = 0
    positions = np.where(index < tokens // 3, index, index - tokens // 3)
    return jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)


@pytest.mark.parametrize("tokens", [1, 33, 150, 300])
def test_values_and_gradients_are_the_formulas(tokens):
    *inputs, weights = arrays(tokens, tokens)
    mask = attention_mask(*packed(tokens), *packed(tokens))

    def run(form):
        return jax.value_and_grad(lambda *x: jnp.sum(weights * form(*x, mask)), argnums=(0, 1, 2))(*inputs)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), run(attend), run(plain))


def test_fewer_queries_than_keys_see_what_the_mask_says():
    *inputs, _ = arrays(128, 200)
    mask = jax.random.bernoulli(jax.random.key(5), 0.5, (2, 128, 200))
    np.testing.assert_allclose(attend(*inputs, mask), plain(*inputs, mask), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tokens", [9, 150])
def test_soft_caps_and_scales_have_the_formulas_gradients(tokens):
    *inputs, weights = arrays(tokens, tokens)
    mask = attention_mask(*packed(tokens), *packed(tokens))

    def capped(queries, keys, values):
        groups = queries.shape[2] // keys.shape[2]
        keys, values = jnp.repeat(keys, groups, axis=2), jnp.repeat(values, groups, axis=2)
        scores = 1.5 * jnp.tanh(0.4 * jnp.einsum("bthf,bshf->bhts", queries, keys) / 1.5)
        attention = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bhts,bshf->bthf", attention, values)

    def run(form):
        return jax.value_and_grad(lambda *x: jnp.sum(weights * form(*x)), argnums=(0, 1, 2))(*inputs)

    ours = run(lambda *x: attend(*x, mask, 0.4, 1.5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, run(capped))


@pytest.mark.parametrize("window", [1, 3, None])
def test_a_query_sees_its_document_up_to_itself_within_the_window(window):
    positions, segments = packed(12)
    seen = np.asarray(attention_mask(positions, segments, positions, segments, window))
    for row, query, key in np.ndindex(seen.shape):
        distance = int(positions[row, query] - positions[row, key])
        alike = segments[row, query] == segments[row, key]
        assert seen[row, query, key] == (alike and 0 <= distance < (window or 12)), (row, query, key)


def test_scores_are_no_residual():
    *inputs, _ = arrays(96, 96)
    mask = attention_mask(*packed(96), *packed(96))
    _, pullback = jax.vjp(lambda *x: attend(*x, mask), *inputs)
    assert max(leaf.size for leaf in jax.tree.leaves(pullback)) <= max(mask.size, inputs[0].size)


def test_a_branch_sees_its_segment_and_itself():
    segments = jnp.array([[1, 1, 1 + BRANCH, 1 + BRANCH, 1 + 2 * BRANCH, 2, 0]], jnp.int32)
    positions = jnp.array([[0, 1, 2, 3, 2, 0, 0]], jnp.int32)
    [seen] = np.asarray(attention_mask(positions, segments, positions, segments))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [6]]
    [near] = np.asarray(attention_mask(positions, segments, positions, segments, window=2))
    assert [np.flatnonzero(row).tolist() for row in near] == [[0], [0, 1], [1, 2], [2, 3], [1, 4], [5], [6]]
