"""What is made to wait keeps its values, and is made once for a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.kernels import order


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    monkeypatch.setattr(order, "target", lambda: request.param)


@pytest.mark.parametrize("first", [1.0, np.nan, np.inf, -np.inf])
def test_what_waits_keeps_its_values_whatever_it_waits_for(device, first):
    values = {"large": jnp.arange(6.0), "small": jnp.float32(0.25)}
    found, x = order.after(values, jnp.array([first, 2.0]))
    jax.tree.map(np.testing.assert_array_equal, found, values)
    np.testing.assert_array_equal(x, [first, 2.0])


def test_what_a_batch_shares_is_made_once(device):
    """Adapters side by side must not each have a kernel of their own."""
    shared = jnp.ones((3, 4))

    def one(x):
        waiting, x = order.after(shared, x)
        return x @ waiting

    found = jax.make_jaxpr(jax.vmap(one))(jnp.ones((5, 2, 3)))
    assert not [v for e in found.jaxpr.eqns[:-1] for v in e.outvars if v.aval.shape == (5, 3, 4)]


def test_gradients_pass_in_turn(device):
    def loss(a, b):
        first, b = order.in_turn(a * 2, b)
        return jnp.sum(first * b)

    a, b = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    jax.tree.map(np.testing.assert_array_equal, jax.grad(loss, (0, 1))(a, b), (2 * b, 2 * a))
