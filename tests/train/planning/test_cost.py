"""The FLOPs and bytes of traced programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from jlora import sharding
from jlora.kernels.attention import Marks, attend
from jlora.train.planning.cost import Cost, cost


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


@pytest.mark.parametrize("form", ["plain", "triton_interpreted"])
def test_attention_costs_its_products(form):
    """Of the causal half; plain computes up to the end of each quarter, and the kernel says what it multiplies."""
    tokens = jnp.zeros((2, 256), jnp.int32)
    marks = Marks(tokens, tokens, tokens, tokens, branches=False)

    def forward(queries, keys, values):
        return attend(queries, keys, values, marks, 1.0, form=form)

    def backward(*x):
        return jax.vjp(forward, *x)[1](x[0])

    whole = 2 * 2 * 4 * 256 * 256 * 16  # of one product of all pairs
    kept = {"plain": 5 / 8, "triton_interpreted": 1 / 2}[form]
    again = {"plain": 5, "triton_interpreted": 7}[form]
    shapes = (2, 256, 4, 16), (2, 256, 2, 16), (2, 256, 2, 16)
    assert of(forward, *shapes).flops == 2 * whole * kept
    assert of(backward, *shapes).flops == (2 + again) * whole * kept


def test_what_each_device_does_counts_for_all(devices=4):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=devices), jax.devices()[:devices])
    with sharding.on(mesh):
        split = jax.shard_map(
            jnp.matmul, in_specs=(jax.P(("data", "fsdp")), jax.P()), out_specs=jax.P(("data", "fsdp"))
        )
        assert of(split, (8, 4), (4, 4)).flops == of(jnp.matmul, (8, 4), (4, 4)).flops
