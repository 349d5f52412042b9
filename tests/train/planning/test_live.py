"""The memory that a traced program holds at its fullest."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from jlora.train.planning.live import live_bytes

N = 64
SIZE = N * N * 4


def of(function, count=2, platform="cuda"):
    return live_bytes(jax.make_jaxpr(function)(*[jnp.zeros((N, N))] * count).jaxpr, platform)


def test_products_live_until_their_last_use():
    assert of(lambda a, b: a @ b) == SIZE
    assert of(lambda a, b: (a @ b) @ b) == 2 * SIZE
    assert of(lambda a, b: ((a @ b) @ b) @ b) == 2 * SIZE

    def kept(a, b):
        first = a @ b
        return ((first @ b) @ b) @ first

    assert of(kept) == 3 * SIZE


def test_elementwise_results_are_computed_where_they_are_used():
    assert of(lambda a, b: jnp.tanh(a @ b) * 2 + b) == SIZE
    assert of(lambda a, b: jnp.tanh(a) @ b) == 2 * SIZE  # a product reads an array

    def late(a, b):  # what it is made of is kept for it
        first = a @ b
        scaled = first * 2
        return ((a @ a) @ b) + scaled

    assert of(late) == 3 * SIZE


def test_a_kernel_reads_arrays_as_a_product_does():
    def kernel(x, y):
        y[...] = x[...]

    copied = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((N, N), jnp.float32), interpret=True)
    assert of(lambda a, b: copied(a @ b)) == 2 * SIZE
    assert of(lambda a, b: copied(jnp.tanh(a) * b)) == 2 * SIZE


def test_calls_count_as_what_is_in_them_and_loops_as_their_fullest_turn():
    inner = jax.jit(lambda a, b: (a @ b) @ b)
    assert of(lambda a, b: inner(a, b) @ b) == of(lambda a, b: ((a @ b) @ b) @ b)

    def looped(a, b):
        return jax.lax.scan(lambda x, _: ((x @ b) @ b, x), a, None, length=5)

    assert of(looped) == (1 + 5 + 2) * SIZE


def test_remat_is_seen():
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(x, w, layer=layer):
        return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, jnp.stack([w] * 8))[0])

    def gradient(layer):
        return jax.grad(lambda x, w: loss(x, w, layer))

    assert of(gradient(jax.checkpoint(layer))) < 0.75 * of(gradient(layer))


@pytest.mark.parametrize(("platform", "products"), [("tpu", 1), ("cuda", 3)])
def test_of_branches_for_platforms_the_platforms_own_counts(platform, products):
    def chosen(a, b):
        def other(a, b):
            first, second = a @ b, b @ a
            return first @ second

        return jax.lax.platform_dependent(a, b, tpu=jnp.matmul, default=other)

    assert of(chosen, platform=platform) == products * SIZE


def test_what_is_offloaded_is_the_hosts():
    def looped(a, b):
        def body(x, _):
            return x @ b, jax.device_put(x, jax.memory.Space.Host)

        return jax.lax.scan(body, a, None, length=5)

    jaxpr = jax.make_jaxpr(looped)(jnp.zeros((N, N)), jnp.zeros((N, N))).jaxpr
    assert live_bytes(jaxpr, "cuda") == (1 + 1) * SIZE
    assert live_bytes(jaxpr, "cuda", host=True) == (5 + 1) * SIZE
