"""Weights of 16 bits take steps that rounding alone would lose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.optim import OptimConfig, gradient_point, make_optimizer
from jlora.optim.narrow import noise, round_at_random


def moved(weights, steps, dtype="bfloat16", size=400):
    """Weights of 1 after steps of 1e-4, which bfloat16's rounding (2⁻⁸ at 1) would lose one by one, and the state."""
    config = OptimConfig(learning_rate=1e-4, schedule="constant", max_grad_norm=0.0)
    optimizer = make_optimizer(config, steps, trained=lambda path: True, weights=weights)
    params = {"a": {"kernel": jnp.ones(size, dtype)}, "norm": {"scale": jnp.ones(3, jnp.float32)}}
    grads = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.float32), params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_masters_keep_small_steps_and_weights_are_the_masters_rounded():
    params, state = moved("masters", 60)
    np.testing.assert_allclose(state.weights["a"]["kernel"], 1 - 60e-4, rtol=1e-5)
    np.testing.assert_array_equal(params["a"]["kernel"], state.weights["a"]["kernel"].astype(jnp.bfloat16))
    assert "norm" not in state.weights  # 32 bits need no copy
    np.testing.assert_allclose(params["norm"]["scale"], 1 - 60e-4, rtol=1e-5)
    alone, _ = moved(None, 60)
    assert (alone["a"]["kernel"] == 1).all()


def test_random_rounding_is_right_on_average():
    params, _ = moved("stochastic", 60)
    found = np.asarray(params["a"]["kernel"], np.float32)
    assert len(set(found)) > 1 and abs(found.mean() - (1 - 60e-4)) < 4 * 2**-9 / 400**0.5 * 2
    np.testing.assert_allclose(params["norm"]["scale"], 1 - 60e-4, rtol=1e-5)
    values = jnp.array([1.0, 1 + 2**-9, -3.1, 0.0, jnp.inf, jnp.nan], jnp.float32)
    drawn = np.asarray(jax.vmap(lambda key: round_at_random(values, key))(jax.random.split(jax.random.key(0), 2000)))
    assert (drawn[:, 0] == 1).all() and (drawn[:, 3] == 0).all()
    assert np.isinf(drawn[:, 4].astype(np.float32)).all() and np.isnan(drawn[:, 5].astype(np.float32)).all()
    near = drawn[:, 1:3].astype(np.float32)
    np.testing.assert_allclose(near.mean(axis=0), values[1:3], atol=1e-3)
    assert [len(set(column)) for column in near.T] == [2, 2]


def test_averaged_weights_take_their_gradients_between_the_average_and_the_newest_in_16_bits():
    config = OptimConfig(name="schedule_free_adamw", learning_rate=0.1, max_grad_norm=0.0)
    params = {"a": {"kernel": jnp.ones(8, jnp.bfloat16)}}
    wide = {"a": {"kernel": jnp.ones(8, jnp.float32)}}
    grads = {"a": {"kernel": jnp.linspace(-1, 1, 8)}}
    found = []
    for weights, start in (("masters", params), (None, wide)):
        optimizer = make_optimizer(config, 3, trained=lambda path: True, weights=weights)
        here, state = start, optimizer.init(start)
        for _ in range(3):
            updates, state = optimizer.update(grads, state, here)
            here = optax.apply_updates(here, updates)
        found.append(gradient_point(here, state)["a"]["kernel"])
    assert found[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0], found[1].astype(jnp.bfloat16))


def test_the_noise_of_rounding_is_uniform_and_of_its_place_alone():
    drawn = [np.asarray(noise(jax.random.key(seed), (3, 64, 96))).astype(np.uint32) >> 16 for seed in (0, 1, 0)]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    counts = np.bincount(drawn[0].ravel() >> 10, minlength=64)
    assert ((counts - 288) ** 2 / 288).sum() < 63 + 4 * (2 * 63) ** 0.5  # χ² of 64 bins, four deviations
    centred = [values / 2**16 - 0.5 for values in drawn[:2]]
    beside = [(centred[0], centred[1])]
    beside += [(centred[0], np.roll(centred[0], 1, axis)) for axis in range(3)]
    for one, other in beside:
        assert abs(np.mean(one * other)) * 12 < 4 / one.size**0.5
