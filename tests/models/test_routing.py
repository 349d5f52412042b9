"""Routers: which experts are chosen, and what each counts."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jlora.families.family import Experts
from jlora.models.routing import choose

PLAIN = Experts(count=6, top_k=2, intermediate_size=4, normalize=False)
LOGITS = jnp.asarray([[2.0, 1.0, 1.9, -1.0, 1.8, 1.7]])


def test_a_softmax_gives_the_likeliest():
    weights, chosen = choose(LOGITS, PLAIN)
    assert chosen.tolist() == [[0, 2]]
    shares = np.exp(LOGITS[0]) / np.sum(np.exp(LOGITS[0]))
    np.testing.assert_allclose(weights[0], shares[[0, 2]], rtol=1e-6)
    weights, _ = choose(LOGITS, dataclasses.replace(PLAIN, normalize=True, scaling=2.5))
    np.testing.assert_allclose(weights[0], 2.5 * shares[[0, 2]] / shares[[0, 2]].sum(), rtol=1e-6)


def test_a_correction_chooses_but_does_not_weigh():
    experts = dataclasses.replace(PLAIN, sigmoid=True, correction=True)
    weights, chosen = choose(LOGITS, experts, jnp.asarray([0, 0, 0, 9.0, 0, 0]))
    assert chosen.tolist() == [[3, 0]]
    np.testing.assert_allclose(weights[0], 1 / (1 + np.exp([1.0, -2.0])), rtol=1e-6)


def test_experts_are_chosen_from_the_best_groups():
    """The group whose two best together are best, not that of the best one."""
    experts = dataclasses.replace(PLAIN, groups=3, top_groups=1)
    assert choose(LOGITS, experts)[1].tolist() == [[4, 5]]
    assert choose(LOGITS, dataclasses.replace(experts, top_groups=2))[1].tolist() == [[0, 4]]
