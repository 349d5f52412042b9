"""The FLOPs and bytes of traced programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

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


@pytest.mark.parametrize("estimate", [None, pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=9)])
def test_a_kernel_multiplies_what_is_on_the_chip(estimate):
    """Two blocks of rows by one matrix: the matrix is read once."""

    def kernel(x, w, y):
        y[...] = x[...] @ w[...]

    def product(x, w):
        return pl.pallas_call(
            kernel,
            grid=(2,),
            in_specs=[pl.BlockSpec((4, 8), lambda i: (i, 0)), pl.BlockSpec((8, 8), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((4, 8), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 8), jnp.bfloat16),
            cost_estimate=estimate,
            interpret=True,
        )(x, w)

    expected = of(jnp.matmul, (8, 8), (8, 8)) if estimate is None else Cost(7.0, 9.0)
    assert of(product, (8, 8), (8, 8)) == expected
