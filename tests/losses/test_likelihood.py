"""Chunked cross-entropy against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import lora
from jlora.losses import cross_entropy, unchanged


def project(head, hidden):
    return lora.linear(hidden, head).astype(jnp.float32)


def plain(head, hidden, targets, weights, term):
    logp = jax.nn.log_softmax(project(head, hidden), axis=-1)
    return jnp.sum(term(-jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]) * weights)


def case(batch=3, tokens=13, width=8, vocabulary=37, seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    head = {
        "kernel": jax.random.normal(keys[0], (width, vocabulary)),
        "lora_a": jax.random.normal(keys[1], (width, 2)),
        "lora_b": jax.random.normal(keys[2], (2, vocabulary)),
        "lora_scale": jnp.float32(0.5),
    }
    hidden = jax.random.normal(keys[3], (batch, tokens, width))
    targets = jax.random.randint(keys[4], (batch, tokens), 0, vocabulary)
    weights = jax.random.bernoulli(keys[5], 0.4, (batch, tokens)).astype(jnp.float32)
    return head, hidden, targets, weights.at[0].set(0)


@pytest.mark.parametrize("term", [unchanged, jnp.square])
@pytest.mark.parametrize("chunk", [1, 6, 12, 1000])
def test_value_and_gradients_equal_the_formula(chunk, term):
    head, hidden, targets, weights = case()
    frozen, trainable = lora.split(head)

    def ours(trainable, hidden):
        head = lora.combine(frozen, trainable)
        return cross_entropy(project, head, hidden, targets, weights, term=term, chunk=chunk).loss * 3

    def formula(trainable, hidden):
        return plain(lora.combine(frozen, trainable), hidden, targets, weights, term) * 3

    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(trainable, hidden)
    expected, expected_grads = jax.value_and_grad(formula, argnums=(0, 1))(trainable, hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, expected_grads)
    np.testing.assert_allclose(ours(trainable, hidden), expected, rtol=1e-5)


def test_a_heads_own_weights_get_gradients_where_they_are_differentiated():
    head, hidden, targets, weights = case()

    def ours(kernel, hidden):
        return cross_entropy(project, head | {"kernel": kernel}, hidden, targets, weights, chunk=6).loss

    def formula(kernel, hidden):
        return plain(head | {"kernel": kernel}, hidden, targets, weights, unchanged)

    found, expected = (jax.grad(each, argnums=(0, 1))(head["kernel"], hidden) for each in (ours, formula))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
    narrow = jax.grad(ours)(head["kernel"].astype(jnp.bfloat16), hidden)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected[0], rtol=0.02, atol=0.03)


def test_counts():
    head, hidden, targets, weights = case()
    likeliest = jnp.argmax(project(head, hidden), axis=-1)
    targets = jnp.where(jnp.arange(13)[None] % 3 < 2, likeliest, targets)  # right on trained tokens and on others
    weights = weights * jnp.linspace(0.5, 2, 13)[None]
    sums = cross_entropy(project, head, hidden, targets, weights, chunk=6)
    right = likeliest == targets
    np.testing.assert_allclose(sums.weight, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.correct, jnp.sum(right * weights), rtol=1e-6)
    assert 0 < sums.correct < sums.weight


def test_no_trained_token_is_zero_loss_and_gradient():
    head, hidden, targets, weights = case()
    grad = jax.grad(lambda h: cross_entropy(project, head, h, targets, 0 * weights).loss)(hidden)
    assert not np.any(grad)


def test_logits_of_the_whole_batch_never_exist():
    head, hidden, targets, weights = case(batch=4, tokens=64, vocabulary=129)
    step = jax.grad(lambda h: cross_entropy(project, head, h, targets, weights, chunk=32).loss)
    text = jax.jit(step).lower(hidden).compile().as_text()
    assert "4,8,129]" in text and "4,64,129]" not in text and "256,129]" not in text
