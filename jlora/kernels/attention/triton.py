"""Attention by kernels for NVIDIA's GPUs, forward and backward: memory is linear in length, time in the pairs seen.

A kernel's program has one block of queries (for the gradients of keys and values, one of keys) and goes through the
blocks that it must be computed with, as in FlashAttention-2 (Dao 2023): a row of many documents costs no more than the
documents do.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas

from jlora.kernels.attention.each import on_each
from jlora.kernels.attention.marks import FAR, Kept, Marks, Scores, is_far, sees
from jlora.kernels.attention.visits import NO_KEY, NO_QUERY, visits
from jlora.kernels.device import capability

TRITON = "jax.experimental.pallas.triton"
# The least size of a product, and the widest heads that shared memory has room for.
LEAST, WIDEST = 16, 256
# The oldest cards that Triton supports: Ampere.
OLDEST = (8, 0)
# The kernels' scores are in units of log₂(e): a GPU has an instruction for powers of two.
LOG2E = math.log2(math.e)
LOWEST = -1e30  # below every score, but finite, so that no difference with it is NaN
# The products for `jax.default_matmul_precision("highest")`: three of TF32. Products of float32 itself would not use
# tensor cores and would take ten times as long to compile.
EXACT = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
# Kernel → products for each pair of a query and a key, including those that recompute the scores.
PRODUCTS = {"forward": 2, "queries": 3, "keys": 4}


class Tile(NamedTuple):
    """The blocks of a kernel and how it is compiled.

    Attributes:
        rows, columns: queries and keys of a block.
        warps: groups of 32 threads for one block.
        stages: depth of the pipeline: the block computed with, and those being loaded meanwhile.
    """

    rows: int
    columns: int
    warps: int
    stages: int


# Kernel → {(bytes of a number, greatest width of a head): tile}, within the 99 KB of shared memory that a block of
# threads has on the smallest cards (RTX 4090, L40S).
TILES = {
    "forward": {
        (2, 64): Tile(128, 64, 4, 3),
        (2, 128): Tile(128, 64, 8, 3),
        (2, 256): Tile(64, 32, 8, 2),
        (4, 64): Tile(64, 64, 4, 2),
        (4, 128): Tile(64, 32, 4, 2),
        (4, 256): Tile(32, 16, 4, 1),
    },
    "queries": {
        (2, 64): Tile(64, 64, 4, 2),
        (2, 128): Tile(64, 32, 4, 2),
        (2, 256): Tile(64, 32, 8, 1),
        (4, 64): Tile(64, 32, 4, 2),
        (4, 128): Tile(32, 32, 4, 2),
        (4, 256): Tile(16, 16, 4, 1),
    },
    "keys": {
        (2, 64): Tile(32, 64, 4, 2),
        (2, 128): Tile(32, 64, 4, 2),
        (2, 256): Tile(32, 32, 8, 2),
        (4, 64): Tile(32, 32, 4, 2),
        (4, 128): Tile(32, 32, 4, 2),
        (4, 256): Tile(16, 16, 4, 1),
    },
}
# Replacements for cards with 227 KB (data-centre Hopper and Blackwell, by the major version of their capability).
LARGE = {
    "forward": {(2, 64): Tile(128, 128, 8, 3), (2, 128): Tile(128, 128, 8, 3), (2, 256): Tile(128, 64, 8, 2)},
    "queries": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 64, 8, 2), (2, 256): Tile(128, 32, 8, 2)},
    "keys": {(2, 64): Tile(64, 128, 8, 2), (2, 128): Tile(64, 128, 8, 2), (2, 256): Tile(32, 64, 8, 2)},
}
OF_LARGE = (9, 10)


def fits(marks: Marks, width: int | None = None) -> str:
    """Why these kernels cannot be used; "" if they can."""
    if marks.size[0] < LEAST:
        return f"fewer than {LEAST} queries"
    if width is not None and width > WIDEST:
        return f"heads of {width} numbers, more than {WIDEST}"
    if (capability() or OLDEST) < OLDEST:
        return "a card older than Ampere"
    return "" if importlib.util.find_spec(TRITON) else "this version of JAX has no Triton"


def forward(
    rule: Scores, queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(the output [B, K, G, T, F], the logarithm of each query's sum of weights, float32 [B, K, G, T])."""

    def run(queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks) -> tuple[jax.Array, jax.Array]:
        given = _Arrays(queries, keys, values)
        y, log_totals = _like(queries, values.dtype), jax.ShapeDtypeStruct(queries.shape[:-1], jnp.float32)
        found = _call("forward", rule, given, _Arrays(grad=y, log_totals=log_totals), marks, interpret)
        return found.grad, found.log_totals

    return on_each(run, (queries, keys, values, marks))


def backward(
    rule: Scores, kept: Kept, grad: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values; sums over blocks are float32."""
    queries, keys, values, marks, y, log_totals = kept
    delta = jnp.sum(grad.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)

    def run(queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks, *more: jax.Array) -> tuple:
        given = _Arrays(queries, keys, values, *more)
        of_queries = _call("queries", rule, given, _Arrays(queries=_like(queries)), marks, interpret)
        results = _Arrays(keys=_like(keys), values=_like(values))
        of_keys = _call("keys", rule, given, results, marks, interpret)
        return of_queries.queries, of_keys.keys, of_keys.values

    return on_each(run, (queries, keys, values, marks, grad, log_totals, delta))


class _Arrays(NamedTuple):
    """The arrays that a kernel reads or writes, None for those it does not.

    Queries and the output or its gradient (`grad`) are [B, K, G, T, F], keys and values [B, K, S, F], the others
    float32 [B, K, G, T].
    """

    queries: Any = None
    keys: Any = None
    values: Any = None
    grad: Any = None
    log_totals: Any = None
    delta: Any = None


class _Rows(NamedTuple):
    """What a kernel reads about the rows: marks [B, T] and [B, S], the blocks to visit, and the window's limit [1]."""

    positions: Any
    segments: Any
    key_positions: Any
    key_segments: Any
    order: Any
    counts: Any
    limit: Any


def _call(name: str, rule: Scores, given: _Arrays, results: _Arrays, marks: Marks, interpret: bool) -> _Arrays:
    """The arrays that a kernel writes, with the shapes of `results`."""
    (batch, heads, groups, tokens, width), size = given.queries.shape, given.keys.shape[2]
    asked = jax.config.jax_default_matmul_precision in ("highest", "float32")
    exact = asked and not interpret and given.queries.dtype == jnp.float32
    tile = _tile(name, given, exact)
    blocks = _Blocks(rule, tile, groups, tokens, size, width, marks.branches, not is_far(marks.limit), exact)
    by_keys = name == "keys"
    programs = pallas.cdiv(size, tile.columns) if by_keys else groups * pallas.cdiv(tokens, tile.rows)
    places = marks.positions, marks.segment_ids, marks.key_positions, marks.key_segment_ids
    found = visits(marks, tile.rows, tile.columns, by_keys)
    of_rows = _Rows(*places, *found, jnp.full((1,), marks.limit, jnp.int32))
    pairs = batch * heads * groups * tokens * size // (2 if marks.aligned else 1)
    return pallas.pallas_call(
        functools.partial(KERNELS[name], blocks),
        grid=(programs, heads, batch),
        in_specs=(blocks.specs(given), blocks.row_specs(of_rows)),
        out_specs=blocks.specs(results),
        out_shape=results,
        compiler_params=_triton().CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pallas.CostEstimate(
            flops=2 * PRODUCTS[name] * pairs * width,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((given, results))),
        ),
        interpret=interpret,
        name=f"attention_{name}",
    )(given, of_rows)


def _tile(name: str, given: _Arrays, exact: bool = False) -> Tile:
    """The kernel's tile, cut to the arrays' size; exact products take several times the memory and get the smallest."""
    *_, tokens, width = given.queries.shape
    tiles = TILES[name] | (LARGE[name] if (capability() or OLDEST)[0] in OF_LARGE else {})
    size, width = given.queries.dtype.itemsize, WIDEST if exact else width
    tile = next(tile for (nbytes, widest), tile in tiles.items() if size <= nbytes and width <= widest)
    rows, columns = min(tile.rows, _padded(tokens)), min(tile.columns, _padded(given.keys.shape[2]))
    return tile._replace(rows=rows, columns=columns)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What a kernel knows about its blocks when it is compiled.

    Attributes:
        branches: whether segments may branch off others.
        limited: whether there may be a window.
        exact: whether products must be as exact as float32.
    """

    rule: Scores
    tile: Tile
    groups: int
    tokens: int
    size: int
    width: int
    branches: bool
    limited: bool
    exact: bool

    def specs(self, arrays: _Arrays) -> _Arrays:
        """The block specs of arrays: a program sees all tokens, up to whole blocks, of its row and key head."""
        of_row, keys = (self.groups, _whole(self.tokens, self.tile.rows)), _whole(self.size, self.tile.columns)
        of_queries, of_keys = (*of_row, _padded(self.width)), (keys, _padded(self.width))
        shapes = of_queries, of_keys, of_keys, of_queries, of_row, of_row
        return _Arrays(*(None if x is None else _spec(2, shape) for x, shape in zip(arrays, shapes, strict=True)))

    def row_specs(self, of_rows: _Rows) -> _Rows:
        """The block specs of the marks: a program sees those of its row."""
        queries, keys = (_whole(self.tokens, self.tile.rows),), (_whole(self.size, self.tile.columns),)
        shapes = queries, queries, keys, keys, of_rows.order.shape[1:], of_rows.counts.shape[1:]
        return _Rows(*(_spec(1, shape) for shape in shapes), _spec(0, (1,)))

    def read_queries(self, ref: Any, block: Any, *group: Any, other: int = 0) -> jax.Array:
        """A block of queries [rows, F], or of their marks or numbers [rows]."""
        return _read(*self._part(ref, group, block, self.tile.rows, self.tokens), other)

    def read_keys(self, ref: Any, block: Any, other: int = 0) -> jax.Array:
        return _read(*self._part(ref, (), block, self.tile.columns, self.size), other)

    def write_queries(self, ref: Any, block: Any, group: Any, x: jax.Array) -> None:
        _write(*self._part(ref, (group,), block, self.tile.rows, self.tokens), x)

    def write_keys(self, ref: Any, block: Any, x: jax.Array) -> None:
        _write(*self._part(ref, (), block, self.tile.columns, self.size), x)

    def _part(self, ref: Any, lead: tuple, block: Any, count: int, total: int) -> tuple[Any, jax.Array | None]:
        """(a block of `ref`, the mask of its elements within the array, or None if all are)."""
        wide = len(ref.shape) > len(lead) + 1
        start, masks = block * count, []
        if total % count:
            inside = start + jnp.arange(count, dtype=jnp.int32) < total
            masks.append(inside[:, None] if wide else inside)
        if wide and _padded(self.width) != self.width:
            masks.append((jnp.arange(_padded(self.width), dtype=jnp.int32) < self.width)[None])
        part = ref.at[(*lead, pallas.ds(start, count), *(slice(None) for _ in range(wide)))]
        shape = (count, _padded(self.width)) if wide else (count,)
        return part, jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape) if masks else None

    def marks_of_queries(self, rows: _Rows, block: Any) -> tuple[jax.Array, jax.Array]:
        """(positions, segments)."""
        return self.read_queries(rows.positions, block), self.read_queries(rows.segments, block, other=NO_QUERY)

    def marks_of_keys(self, rows: _Rows, block: Any) -> tuple[jax.Array, jax.Array]:
        return self.read_keys(rows.key_positions, block), self.read_keys(rows.key_segments, block, other=NO_KEY)

    def masked(self, scores: jax.Array, queries: tuple, keys: tuple, rows: _Rows, value: float) -> jax.Array:
        """The scores, with `value` for pairs that are not seen.

        Scores are [rows, columns], marks [rows, 1] and [1, columns], or the other way round.
        """
        limit = rows.limit[0] if self.limited else FAR
        return jnp.where(sees(queries, keys, limit, self.branches), scores, value)

    def product(self, left: jax.Array, right: jax.Array, of_left: int, of_right: int) -> jax.Array:
        """The product summed over these axes, in float32."""
        axes = (((of_left,), (of_right,)), ((), ()))
        precision, dtype = EXACT if self.exact else None, jnp.promote_types(left.dtype, right.dtype)
        left, right = left.astype(dtype), right.astype(dtype)
        return jax.lax.dot_general(left, right, axes, precision, preferred_element_type=jnp.float32)

    def scores(self, products: jax.Array) -> jax.Array:
        """The scores from products, in units of log₂(e)."""
        scale, cap = self.rule
        if cap is None:
            return products * (scale * LOG2E)
        # The hyperbolic tangent from one power of two, since the library's has branches.
        return (1 - 2 / (1 + jnp.exp2(products * (2 * LOG2E * scale / cap)))) * (cap * LOG2E)

    def gradient(self, scores: jax.Array, grad: jax.Array) -> jax.Array:
        """The gradient of the products without the scale, which the sums are multiplied by later."""
        cap = self.rule.softcap
        return grad if cap is None else grad * (1 - (scores / (cap * LOG2E)) ** 2)


def _forward(blocks: _Blocks, given: _Arrays, rows: _Rows, *written: Any) -> None:
    """A program for each head and block of queries, last blocks first, since they see the most keys."""
    results, (group, block) = _Arrays(*written), _place(blocks)
    queries, marks = blocks.read_queries(given.queries, block, group), _down(blocks.marks_of_queries(rows, block))

    def visit(whole: bool, n: jax.Array, carry: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, top, total = carry
        other = rows.order[block, n]
        scores = blocks.scores(blocks.product(queries, blocks.read_keys(given.keys, other), 1, 1))
        if not whole:
            scores = blocks.masked(scores, marks, _across(blocks.marks_of_keys(rows, other)), rows, -jnp.inf)
        before, top = top, jnp.maximum(top, jnp.max(scores, axis=1))
        weights, kept = jnp.exp2(scores - top[:, None]), jnp.exp2(before - top)
        values = blocks.read_keys(given.values, other)
        y = y * kept[:, None] + blocks.product(weights.astype(values.dtype), values, 1, 0)
        return y, top, total * kept + jnp.sum(weights, axis=1)

    count = blocks.tile.rows
    start = jnp.zeros(queries.shape, jnp.float32), jnp.full((count,), LOWEST), jnp.zeros((count,), jnp.float32)
    some, all_of_them = rows.counts[block, 0], rows.counts[block, 1]
    carry = jax.lax.fori_loop(0, some, functools.partial(visit, False), start)
    y, top, total = jax.lax.fori_loop(some, all_of_them, functools.partial(visit, True), carry)
    total = jnp.where(total > 0, total, 1)  # queries that see nothing give zeros
    blocks.write_queries(results.grad, block, group, y * (1 / total)[:, None])
    blocks.write_queries(results.log_totals, block, group, (top + jnp.log2(total)) * (1 / LOG2E))


def _grad_queries(blocks: _Blocks, given: _Arrays, rows: _Rows, *written: Any) -> None:
    """Programs as in `_forward`."""
    results, (group, block) = _Arrays(*written), _place(blocks)
    queries, marks = blocks.read_queries(given.queries, block, group), _down(blocks.marks_of_queries(rows, block))
    grad = blocks.read_queries(given.grad, block, group)
    log_totals = blocks.read_queries(given.log_totals, block, group)[:, None] * LOG2E
    delta = blocks.read_queries(given.delta, block, group)[:, None]

    def visit(whole: bool, n: jax.Array, found: jax.Array) -> jax.Array:
        other = rows.order[block, n]
        keys = blocks.read_keys(given.keys, other)
        scores = blocks.scores(blocks.product(queries, keys, 1, 1))
        weights = jnp.exp2(scores - log_totals)
        if not whole:
            weights = blocks.masked(weights, marks, _across(blocks.marks_of_keys(rows, other)), rows, 0.0)
        grad_weights = blocks.product(grad, blocks.read_keys(given.values, other), 1, 1)
        grad_scores = blocks.gradient(scores, weights * (grad_weights - delta))
        return found + blocks.product(grad_scores.astype(keys.dtype), keys, 1, 0)

    found = jnp.zeros(queries.shape, jnp.float32)
    some, all_of_them = rows.counts[block, 0], rows.counts[block, 1]
    found = jax.lax.fori_loop(0, some, functools.partial(visit, False), found)
    found = jax.lax.fori_loop(some, all_of_them, functools.partial(visit, True), found)
    blocks.write_queries(results.queries, block, group, found * blocks.rule.scale)


def _grad_keys(blocks: _Blocks, given: _Arrays, rows: _Rows, *written: Any) -> None:
    """A program for each key head and block of keys, with all queries of that head; scores are [columns, rows]."""
    results, block = _Arrays(*written), pallas.program_id(0)
    keys, values = blocks.read_keys(given.keys, block), blocks.read_keys(given.values, block)
    marks = _down(blocks.marks_of_keys(rows, block))

    def visit(whole: bool, first: jax.Array | int, count: jax.Array, n: jax.Array, found: tuple) -> tuple:
        group, other = jax.lax.div(n, count), rows.order[block, first + jax.lax.rem(n, count)]
        queries, grad = (blocks.read_queries(ref, other, group) for ref in (given.queries, given.grad))
        log_totals, delta = (blocks.read_queries(ref, other, group)[None] for ref in (given.log_totals, given.delta))
        scores = blocks.scores(blocks.product(keys, queries, 1, 1))
        weights = jnp.exp2(scores - log_totals * LOG2E)
        if not whole:
            weights = blocks.masked(weights, _across(blocks.marks_of_queries(rows, other)), marks, rows, 0.0)
        grad_values = found[1] + blocks.product(weights.astype(grad.dtype), grad, 1, 0)
        grad_weights = blocks.product(values, grad, 1, 1)
        grad_scores = blocks.gradient(scores, weights * (grad_weights - delta))
        return found[0] + blocks.product(grad_scores.astype(queries.dtype), queries, 1, 0), grad_values

    found = (jnp.zeros(keys.shape, jnp.float32),) * 2
    some, all_of_them = rows.counts[block, 0], rows.counts[block, 1]
    for whole, first, count in ((False, 0, some), (True, some, all_of_them - some)):
        body = functools.partial(visit, whole, first, count)
        found = jax.lax.fori_loop(0, blocks.groups * count, body, found)
    blocks.write_keys(results.keys, block, found[0] * blocks.rule.scale)
    blocks.write_keys(results.values, block, found[1])


KERNELS = {"forward": _forward, "queries": _grad_queries, "keys": _grad_keys}


def _place(blocks: _Blocks) -> tuple[jax.Array, jax.Array]:
    """(query head within the group, block of queries) of a program."""
    number, last = pallas.program_id(0), pallas.cdiv(blocks.tokens, blocks.tile.rows) - 1
    return jax.lax.rem(number, blocks.groups), last - jax.lax.div(number, blocks.groups)


def _down(marks: tuple) -> tuple[jax.Array, ...]:
    return tuple(x[:, None] for x in marks)


def _across(marks: tuple) -> tuple[jax.Array, ...]:
    return tuple(x[None] for x in marks)


def _spec(lead: int, shape: tuple[int, ...]) -> pallas.BlockSpec:
    """The block spec for an array [*lead of (B, K), *shape]: a program sees all of its row and head."""
    return pallas.BlockSpec((*(None,) * lead, *shape), lambda _, head, row: (*(row, head)[:lead], *(0 for _ in shape)))


def _read(part: Any, mask: jax.Array | None, other: int) -> jax.Array:
    return _triton().load(part) if mask is None else _triton().load(part, mask=mask, other=other)


def _write(part: Any, mask: jax.Array | None, x: jax.Array) -> None:
    _triton().store(part, x.astype(part.dtype), mask=mask)


def _like(x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)


def _whole(count: int, block: int) -> int:
    """The count rounded up to whole blocks."""
    return pallas.cdiv(count, block) * block


def _padded(size: int) -> int:
    """The size rounded up to one that products take: a power of two, at least LEAST."""
    return max(LEAST, pallas.next_power_of_2(size))


def _triton() -> Any:
    """Pallas's module for Triton, which later versions of JAX may leave out."""
    return importlib.import_module(TRITON)
