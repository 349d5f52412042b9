"""Products of rows in groups with a matrix for each group: one signature, and one table of the forms that compute it.

XLA has a kernel for `jax.lax.ragged_dot` on a TPU. Elsewhere, and there for the gradient of the matrices, it computes
every row with every group, of which a mask leaves one: E times the arithmetic, and an array [E, rows, D].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.kernels.device import target

# Device → forms of `product` and of `outer`. A GPU computes a tile that holds nothing: to leave it out, it would have
# to ask the host.
BEST = {"cpu": ("tiles_skipped",) * 2, "gpu": ("tiles",) * 2, "tpu": ("ragged", "tiles")}
# Rows of a tile: the most, so that a product is large while its values are few; the fewest that are worth a product.
MOST, FEWEST = 1024, 16


def product(
    x: Float[Array, "rows D"], kernels: Any, sizes: Int[Array, "E"], dense: Callable[[Any], jax.Array], form: str = ""
) -> Float[Array, "rows N"]:
    """x @ dense(kernels)[e] with the e of each row, in x's dtype.

    Args:
        kernels: a tree of arrays [E, …].
        sizes: rows of each group; they lie one after another. Rows that are of no group come out as zeros.
        dense: makes [E, D, N] of the tree, and [D, N] of the tree of one group.
        form: of FORMS; "" is the best on the device.
    """
    return FORMS[form or BEST[target()][0]].product(x, kernels, sizes, dense)


def outer(
    x: Float[Array, "rows D"], grad: Float[Array, "rows N"], sizes: Int[Array, "E"], form: str = ""
) -> Float[Array, "E D N"]:
    """x[rows].T @ grad[rows] of every group's rows, in float32: the gradient of a `product`'s kernels."""
    return FORMS[form or BEST[target()][1]].outer(x, grad, sizes)


class Form(NamedTuple):
    """One way to compute both."""

    product: Callable
    outer: Callable


def _ragged(x: jax.Array, kernels: Any, sizes: jax.Array, dense: Callable[[Any], jax.Array]) -> jax.Array:
    return jax.lax.ragged_dot(x, dense(kernels), sizes)


def _ragged_outer(x: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(x, grad, sizes, numbers, preferred_element_type=jnp.float32)


class _Tile(NamedTuple):
    """Rows from `start` on, of which those that `holds` marks are of the group."""

    group: jax.Array
    start: jax.Array
    holds: jax.Array

    def of_group(self, stacked: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stacked, self.group, keepdims=False)

    def cut(self, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.holds.shape[0])


class _Tiles:
    """Groups of rows in tiles of equally many: each tile has rows of one group."""

    def __init__(self, rows: int, sizes: jax.Array) -> None:
        groups = sizes.shape[0]
        fit = max(1, rows // (2 * groups))  # half of an average group, so that few tiles are mostly empty
        self.rows, self.height = rows, min(rows, max(FEWEST, min(MOST, 1 << (fit.bit_length() - 1))))
        self.most = rows // self.height + min(groups, rows)
        self._ends = jnp.cumsum(sizes)
        self._begins = self._ends - sizes
        counts = -(-sizes // self.height)
        self._last = jnp.cumsum(counts)  # the number after each group's last tile
        self._first = self._last - counts

    def loop(self, step: Callable[[_Tile, jax.Array], jax.Array], found: jax.Array, skip: bool) -> jax.Array:
        """`found` after step(tile, found) of every tile, `skip`: that holds something."""

        def one(found: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            if not skip:
                return step(self._tile(number), found), None
            full = number < self._last[-1]
            return jax.lax.cond(full, lambda found: step(self._tile(number), found), lambda found: found, found), None

        return jax.lax.scan(one, found, jnp.arange(self.most))[0]

    def _tile(self, number: jax.Array) -> _Tile:
        # Tiles beyond the last are of the last group, and begin where it ends.
        group = jnp.minimum(jnp.sum(self._last <= number), self._last.shape[0] - 1)
        begin = self._begins[group] + (number - self._first[group]) * self.height
        start = jnp.clip(begin, 0, self.rows - self.height)  # a slice that would go beyond the array begins earlier
        places = start + jnp.arange(self.height)
        return _Tile(group, start, (places >= begin) & (places < jnp.minimum(begin + self.height, self._ends[group])))


def _tiled(skip: bool) -> Form:
    def product(x: jax.Array, kernels: Any, sizes: jax.Array, dense: Callable[[Any], jax.Array]) -> jax.Array:
        tiles = _Tiles(x.shape[0], sizes)

        def step(tile: _Tile, y: jax.Array) -> jax.Array:
            kernel = dense(jax.tree.map(tile.of_group, kernels))
            new = jnp.where(tile.holds[:, None], tile.cut(x) @ kernel, tile.cut(y))
            return jax.lax.dynamic_update_slice_in_dim(y, new, tile.start, axis=0)

        width = jax.eval_shape(dense, kernels).shape[-1]
        return tiles.loop(step, _zeros((x.shape[0], width), x.dtype, x), skip)

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
    """Zeros that (inside `jax.shard_map`) differ from device to device where x does, as what a loop makes of them."""
    zero = jnp.where(x[0, 0] > 0, 0, 0).astype(dtype)
    return jnp.broadcast_to(zero, shape)
