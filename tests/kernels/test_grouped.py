"""Every form of grouped products against a product for each group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import sharding
from jlora.kernels import grouped
from jlora.kernels.grouped import FORMS
from jlora.quant import grouped_matmul

SIZES = [
    [7, 0, 70, 1, 0, 22],
    [0, 0, 0, 100, 0, 0],
    [100, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 100],
    [16, 16, 16, 16, 16, 20],
    [3, 0, 2, 0, 0, 4],  # 91 rows of none
]


def arrays(rows=100, groups=6, inputs=10, outputs=13):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, inputs), (groups, inputs, outputs), (rows, outputs)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def one_by_one(x, kernels, sizes):
    ends = np.cumsum(sizes)
    rows = [x[end - size : end] @ kernel for kernel, size, end in zip(kernels, sizes, ends, strict=True)]
    return jnp.concatenate([*rows, jnp.zeros((len(x) - ends[-1], kernels.shape[2]))])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_and_gradients_are_those_of_a_product_for_each_group(form, sizes, monkeypatch):
    x, kernels, grad = arrays()
    monkeypatch.setattr(grouped, "BEST", {"cpu": (form, form)})
    value, pull = jax.vjp(functools.partial(grouped_matmul, sizes=jnp.array(sizes)), x, kernels)
    expected, pull_expected = jax.vjp(lambda x, k: one_by_one(x, k, sizes), x, kernels)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (value, *pull(grad)), (expected, *pull_expected(grad)))


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (1, 9), (15, 2), (33, 40), (700, 3)])
def test_any_number_of_rows(rows, groups):
    x, kernels, _ = arrays(rows, groups)
    sizes = np.bincount(np.random.default_rng(rows).integers(0, groups, rows), minlength=groups)
    for form in ("tiles", "tiles_skipped"):
        found = grouped.product(x, kernels, jnp.asarray(sizes), lambda kernels: kernels, form)
        np.testing.assert_allclose(found, one_by_one(x, kernels, sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["tiles", "tiles_skipped"])
def test_rows_meet_their_own_kernel_only(form):
    """Not every kernel, of which a mask leaves one: nothing is as large as the rows for every group."""
    x, kernels, _ = arrays(4096, 64)
    sizes = jnp.full((64,), 64)
    program = jax.jit(lambda *x: grouped.product(*x, lambda kernels: kernels, form)).lower(x, kernels, sizes).compile()
    assert program.memory_analysis().temp_size_in_bytes < x.nbytes * 8
    expected = one_by_one(x, kernels, np.asarray(sizes))
    np.testing.assert_allclose(program(x, kernels, sizes), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["tiles", "tiles_skipped"])
def test_each_device_has_rows_of_its_own(form, monkeypatch):
    x, kernels, grad = arrays(64, 4)
    sizes = jnp.array([[5, 0, 17, 10], [0, 31, 1, 0]])
    monkeypatch.setattr(grouped, "BEST", {"cpu": (form, form)})
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2), jax.devices()[:2])
    split, whole = jax.sharding.PartitionSpec("fsdp"), jax.sharding.PartitionSpec()

    def product(x, kernels, sizes):
        run = lambda x, kernels, sizes: grouped_matmul(x, kernels, sizes[0])  # noqa: E731
        return jax.shard_map(run, mesh=mesh, in_specs=(split, whole, split), out_specs=split)(x, kernels, sizes)

    value, pull = jax.vjp(lambda x, k: product(x, k, sizes), x, kernels)
    both, pull_both = jax.vjp(
        lambda x, k: jnp.concatenate([one_by_one(x[32 * n :][:32], k, np.asarray(sizes[n])) for n in range(2)]),
        x,
        kernels,
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (value, *pull(grad)), (both, *pull_both(grad)))
