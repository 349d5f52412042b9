"""Chunked log-probabilities against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import lora
from jlora.losses import token_scores


def project(head, hidden):
    return lora.linear(hidden, head).astype(jnp.float32)


def plain(head, hidden, targets, weights, temperature=1.0):
    """log-probabilities of the targets, and entropy, correctness and mean of the logits."""
    logits = project(head, hidden) / temperature
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    found = chosen, entropy, jnp.argmax(logits, axis=-1) == targets, jnp.mean(logits, axis=-1)
    return tuple(jnp.where(weights != 0, values, 0) for values in found)


@pytest.fixture
def case():
    """(head with an adapter, hidden, targets, weights); a row counts nothing, another everything."""
    keys = jax.random.split(jax.random.key(0), 6)
    head = {
        "kernel": jax.random.normal(keys[0], (8, 37)),
        "lora_a": jax.random.normal(keys[1], (8, 2)),
        "lora_b": jax.random.normal(keys[2], (2, 37)),
        "lora_scale": jnp.float32(0.5),
    }
    hidden = jax.random.normal(keys[3], (4, 13, 8))
    weights = jax.random.bernoulli(keys[5], 0.4, (4, 13)).astype(jnp.float32).at[0].set(0).at[1].set(1)
    targets = jax.random.randint(keys[4], (4, 13), 0, 37)
    likeliest = jnp.argmax(project(head, hidden), axis=-1).astype(targets.dtype)
    return head, hidden, targets.at[:, ::3].set(likeliest[:, ::3]), weights


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 6, 16, 1000])
def test_scores_and_gradients_equal_the_formula(chunk, temperature, case):
    head, hidden, targets, weights = case
    frozen, trainable = lora.split(head)
    rate = jax.random.normal(jax.random.key(7), weights.shape)

    def ours(trainable, hidden):
        whole = lora.combine(frozen, trainable)
        found = token_scores(project, whole, hidden, targets, weights, chunk=chunk, temperature=temperature)
        return jnp.sum(rate * jnp.square(found.log_probs)), tuple(found)

    def formula(trainable, hidden):
        found = plain(lora.combine(frozen, trainable), hidden, targets, weights, temperature)
        return jnp.sum(rate * jnp.square(found[0])), found

    (_, found), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(trainable, hidden)
    (_, expected), expected_grads = jax.value_and_grad(formula, argnums=(0, 1), has_aux=True)(trainable, hidden)
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)
    assert jnp.sum(expected[2]) > 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), grads, expected_grads)


def test_gradients_flow_through_the_log_probabilities_only(case):
    head, hidden, targets, weights = case

    def others(hidden):
        found = token_scores(project, head, hidden, targets, weights, chunk=8)
        return jnp.sum(found.entropy + found.mean_logits + found.correct)

    assert not np.any(jax.grad(others)(hidden))


def test_a_token_that_does_not_count_has_no_gradient(case):
    head, hidden, targets, weights = case
    hidden = hidden.at[0].set(jnp.inf)

    def total(hidden, weights):
        return jnp.sum(token_scores(project, head, hidden, targets, weights, chunk=8).log_probs)

    gradient = jax.grad(total)(hidden.at[0].set(0), weights)
    assert np.all(np.any(gradient != 0, axis=-1) == (weights != 0))
    assert total(hidden, 0 * weights) == 0 and not np.any(jax.grad(total)(hidden, 0 * weights))


def test_logits_of_the_whole_batch_never_exist(case):
    head, *_ = case
    hidden, targets, weights = jnp.ones((4, 64, 8)), jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64))
    step = jax.grad(lambda h: jnp.sum(jnp.square(token_scores(project, head, h, targets, weights, chunk=32).log_probs)))
    text = jax.jit(step).lower(hidden).compile().as_text()
    assert "4,8,37]" in text and "4,64,37]" not in text and "256,37]" not in text
