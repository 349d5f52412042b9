"""The FLOPs and bytes of traced programs."""

import jax
import jax.numpy as jnp

from jlora.train.cost import Cost, cost


def of(function, *shapes):
    return cost(jax.make_jaxpr(function)(*(jnp.zeros(shape, jnp.bfloat16) for shape in shapes)).jaxpr)


def test_a_product():
    assert of(jnp.matmul, (3, 5), (5, 7)) == Cost(210.0, 2.0 * (15 + 35 + 21))


def test_loops_count_as_often_as_they_run_and_branches_once():
    def looped(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: x @ w)

    one = of(jnp.matmul, (4, 4), (4, 4))
    assert of(looped, (4, 4), (6, 4, 4)) == one * 6
    assert of(branched, (4, 4), (4, 4)) == one
    assert of(jax.jit(jax.checkpoint(jnp.matmul)), (4, 4), (4, 4)) == one


def test_products_of_groups_of_rows():
    def grouped(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([2, 4], jnp.int32))

    assert of(grouped, (6, 4), (2, 4, 8)).flops == 2 * 6 * 4 * 8
