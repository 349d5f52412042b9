"""Products of groups of rows with a matrix for each group: one signature, and a table of the forms that compute it.

XLA has a kernel for `jax.lax.ragged_dot` on TPUs. Elsewhere, and on TPUs for the gradient of the matrices, it computes
every row with every group and masks all but one: E times the arithmetic, and an array [E, rows, D].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.kernels.device import target

# Device → forms of `product` and of `outer`. A GPU computes even empty tiles: to skip one, it would have to ask the
# host.
BEST = {"cpu": ("tiles_skipped",) * 2, "gpu": ("tiles",) * 2, "tpu": ("ragged", "tiles")}
# Bounds of a tile's rows: MOST makes its product large while its values are few, FEWEST are worth a product.
MOST, FEWEST = 1024, 16


def product(
    x: Float[Array, "rows D"],
    kernels: Any,
    sizes: Int[Array, "E"],
    dense: Callable[[Any], jax.Array],
    form: str = "",
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Float[Array, "rows N"]:
    """x @ dense(kernels)[e] for each row, where e is the row's group.

    Args:
        kernels: a tree of arrays [E, …].
        sizes: rows of each group; groups are consecutive. Rows after the last group come out as zeros.
        dense: turns the tree into [E, D, N], and the tree of one group into [D, N].
        form: a name of FORMS; "" is the best on the device.
        preferred_element_type: the result's dtype; default: x's.
    """
    return FORMS[form or BEST[target()][0]].product(x, kernels, sizes, dense, preferred_element_type or x.dtype)


def outer(
    x: Float[Array, "rows D"], grad: Float[Array, "rows N"], sizes: Int[Array, "E"], form: str = ""
) -> Float[Array, "E D N"]:
    """x[rows].T @ grad[rows] for every group's rows, in float32: the gradient of a `product`'s kernels."""
    return FORMS[form or BEST[target()][1]].outer(x, grad, sizes)


class Form(NamedTuple):
    """One way to compute both products."""

    product: Callable
    outer: Callable


def _ragged(
    x: jax.Array, kernels: Any, sizes: jax.Array, dense: Callable[[Any], jax.Array], dtype: jax.typing.DTypeLike
) -> jax.Array:
    return jax.lax.ragged_dot(x, dense(kernels), sizes, preferred_element_type=dtype)


def _ragged_outer(x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(x, grad, sizes, numbers, preferred_element_type=jnp.float32)


class _Tile(NamedTuple):
    """The rows from `start` on, of which `holds` marks those that belong to the group."""

    group: jax.Array
    start: jax.Array
    holds: jax.Array

    def of_group(self, stacked: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stacked, self.group, keepdims=False)

    def cut(self, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.holds.shape[0])


class _Tiles:
    """Groups of rows cut into tiles of equal height, each with rows of one group."""

    def __init__(self, rows: int, sizes: jax.Array) -> None:
        groups = sizes.shape[0]
        fit = max(1, rows // (2 * groups))  # half an average group, so that few tiles are mostly empty
        self.rows, self.height = rows, min(rows, max(FEWEST, min(MOST, 1 << (fit.bit_length() - 1))))
        self.most = rows // self.height + min(groups, rows)
        self._ends = jnp.cumsum(sizes)
        self._begins = self._ends - sizes
        counts = -(-sizes // self.height)
        self._last = jnp.cumsum(counts)  # the number after each group's last tile
        self._first = self._last - counts

    def loop(self, step: Callable[[_Tile, jax.Array], jax.Array], found: jax.Array, skip: bool) -> jax.Array:
        """`found` after found = step(tile, found) for every tile, or with `skip` for every tile that is not empty."""

        def one(found: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            if not skip:
                return step(self._tile(number), found), None
            full = number < self._last[-1]
            return jax.lax.cond(full, lambda found: step(self._tile(number), found), lambda found: found, found), None

        return jax.lax.scan(one, found, jnp.arange(self.most))[0]

    def _tile(self, number: jax.Array) -> _Tile:
        # Tiles beyond the last belong to the last group and begin where it ends.
        group = jnp.minimum(jnp.sum(self._last <= number), self._last.shape[0] - 1)
        begin = self._begins[group] + (number - self._first[group]) * self.height
        start = jnp.clip(begin, 0, self.rows - self.height)  # a slice that would pass the array's end begins earlier
        places = start + jnp.arange(self.height)
        return _Tile(group, start, (places >= begin) & (places < jnp.minimum(begin + self.height, self._ends[group])))


def _tiled(skip: bool) -> Form:
    def product(
        x: jax.Array, kernels: Any, sizes: jax.Array, dense: Callable[[Any], jax.Array], dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        tiles = _Tiles(x.shape[0], sizes)

        def step(tile: _Tile, y: jax.Array) -> jax.Array:
            kernel = dense(jax.tree.map(tile.of_group, kernels))
            found = jnp.matmul(tile.cut(x), kernel, preferred_element_type=dtype)
            new = jnp.where(tile.holds[:, None], found, tile.cut(y))
            return jax.lax.dynamic_update_slice_in_dim(y, new, tile.start, axis=0)

        width = jax.eval_shape(dense, kernels).shape[-1]
        return tiles.loop(step, _zeros((x.shape[0], width), dtype, x), skip)

    def outer(x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
        tiles = _Tiles(x.shape[0], sizes)

        def step(tile: _Tile, found: jax.Array) -> jax.Array:
            rows = jnp.where(tile.holds[:, None], tile.cut(x), 0)
            new = jnp.einsum("md,mn->dn", rows, tile.cut(grad), preferred_element_type=jnp.float32)
            return found.at[tile.group].add(new)

        return tiles.loop(step, _zeros((sizes.shape[0], x.shape[1], grad.shape[1]), jnp.float32, x), skip)

    return Form(product, outer)


FORMS = {"ragged": Form(_ragged, _ragged_outer), "tiles": _tiled(skip=False), "tiles_skipped": _tiled(skip=True)}


def _zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, x: jax.Array) -> jax.Array:
    """Zeros that, inside `jax.shard_map`, vary over the devices as x does, as a loop's carry must."""
    zero = jnp.where(x[0, 0] > 0, 0, 0).astype(dtype)
    return jnp.broadcast_to(zero, shape)
