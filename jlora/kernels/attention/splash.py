"""Attention by JAX's splash kernels, on a TPU or interpreted: forward and backward, linear in memory.

The kernels compare a query's segment with a key's, so a branch, which sees two segments, takes two calls: one for its
own tokens, one for what it branches off. The outputs are joined by the logarithms of their sums of weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from jlora.kernels.attention.each import on_each
from jlora.kernels.attention.marks import Kept, Marks, Scores
from jlora.types import BRANCH

# Numbers of tokens and widths of heads are padded to multiples of a TPU's lanes.
LANES = 128
# The widest blocks of queries and keys; a block is the largest power of two up to it that divides the tokens.
WIDEST = 512
# Segments that no token has: for padding, and for queries that branch off nothing.
PADDING, NOTHING = -1, -2


def fits(marks: Marks, width: int | None = None) -> str:
    """Why these kernels cannot be used; "" if they can."""
    if not marks.aligned:
        return "the queries are not the keys' tokens (a cache, or a mesh that splits tokens and not the heads)"
    if marks.branches and any(window is not None for window in marks.windows):
        return "windows in segments that branch off others (the kernels count by index, not by position)"
    return ""


def forward(
    rule: Scores, queries: jax.Array, keys: jax.Array, values: jax.Array, marks: Marks, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(the output [B, K, G, T, F], the logarithm of each query's sum of weights, float32 [B, K, G, T])."""
    batch, heads, groups, tokens, width = queries.shape
    rows = _rows(rule, queries, keys, values)

    def one(window: int | None, rows: tuple) -> tuple[jax.Array, jax.Array]:
        return on_each(jax.vmap(functools.partial(_forward, window, rule.softcap, interpret)), rows)

    y, log_totals = _by_branch(marks, lambda segments: _by_window(marks, one, (*rows, *segments)), _join)
    y = y.reshape(batch, heads, groups, *y.shape[2:])[..., :tokens, :width]
    return y, log_totals.reshape(batch, heads, groups, -1)[..., :tokens]


def backward(
    rule: Scores, kept: Kept, grad: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values."""
    queries, keys, values, marks, y, log_totals = kept
    tokens, width = queries.shape[-2:]
    rows = _rows(rule, queries, keys, values)
    y, grad = (_padded(x).reshape(*rows[0].shape) for x in (y, grad))
    log_totals = _pad(log_totals, -1, LANES).reshape(rows[0].shape[:-1])

    def one(window: int | None, rows: tuple) -> tuple[jax.Array, ...]:
        return on_each(jax.vmap(functools.partial(_backward, window, rule.softcap, interpret)), rows)

    def both(segments: tuple) -> tuple[jax.Array, ...]:
        return _by_window(marks, one, (*rows, *segments, y, log_totals, grad))

    grads = _by_branch(marks, both, lambda own, more: tuple(map(jnp.add, own, more)))
    grad_queries = grads[0][..., :tokens, :width].reshape(queries.shape).astype(jnp.float32) * rule.scale
    return (
        grad_queries.astype(queries.dtype),
        *(found[..., :tokens, :width].astype(x.dtype) for found, x in zip(grads[1:], (keys, values), strict=True)),
    )


def _by_branch(marks: Marks, run: Callable, join: Callable) -> tuple[jax.Array, ...]:
    """run((queries' segments, keys' segments)) [B, T'], joined with its result for branches if there are any.

    The second result is that for the segments that branches branch off.
    """
    room = [(0, 0), (0, -marks.size[0] % LANES)]
    segments = jnp.pad(marks.segment_ids, room, constant_values=PADDING)
    own = run((segments, segments))
    if not marks.branches:
        return own
    beginnings = jnp.where(segments >= BRANCH, segments % BRANCH, NOTHING)
    more = functools.partial(run, (beginnings, segments))
    return jax.lax.cond(jnp.any(segments >= BRANCH), lambda own: join(own, more()), lambda own: own, own)


def _join(one: tuple, two: tuple) -> tuple[jax.Array, jax.Array]:
    """The output and logarithms over the keys of both calls.

    A call that saw no key has a logarithm near float32's lowest number, and so no weight.
    """
    log_totals = jnp.logaddexp(one[1], two[1])
    parts = (y.astype(jnp.float32) * jnp.exp(logs - log_totals)[..., None] for y, logs in (one, two))
    return sum(parts).astype(one[0].dtype), log_totals


def _by_window(marks: Marks, run: Callable, rows: tuple) -> tuple[jax.Array, ...]:
    """The result of `run` for this layer's window; a kernel is made for each window."""
    forms = [functools.partial(run, window) for window in marks.windows]
    return forms[0](rows) if marks.chosen is None else jax.lax.switch(marks.chosen, forms, rows)


def _rows(rule: Scores, queries: jax.Array, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, ...]:
    """Queries [B, H, T', F'], scaled, keys and values [B, K, T', F'], padded to whole lanes."""
    scaled = (queries.astype(jnp.float32) * rule.scale).astype(queries.dtype)
    queries, keys, values = (_padded(x) for x in (scaled, keys, values))
    return queries.reshape(queries.shape[0], -1, *queries.shape[3:]), keys, values


def _padded(x: jax.Array) -> jax.Array:
    return _pad(_pad(x, -1, LANES), -2, LANES)


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    room = [(0, 0)] * x.ndim
    room[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, room) if room[axis][1] else x


def _forward(
    window: int | None, softcap: float | None, interpret: bool, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(output, logarithms) from queries, keys, values, the segments of queries and of keys."""
    queries, keys, values, *segments = arrays
    kernel = _kernel(window, softcap, interpret, *queries.shape[:2])
    y, (log_totals,) = kernel(queries, keys, values, splash.SegmentIds(*segments))
    return y, log_totals


def _backward(
    window: int | None, softcap: float | None, interpret: bool, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients from the arrays of `_forward`, its output and logarithms, and the output's gradient."""
    queries, keys, values, *segments, y, log_totals, grad = arrays
    # The kernel's own backward pass, which has no public name in JAX, without computing the forward pass again.
    kernel = _kernel(window, softcap, interpret, *queries.shape[:2])
    infos = kernel.dq_mask_info, kernel.dkv_mask_info
    residuals = (queries, keys, values, splash.SegmentIds(*segments), None, y, log_totals, *infos)
    return splash._splash_attention_bwd(**kernel.kwargs, res=residuals, do=grad)[3:6]


@functools.lru_cache(maxsize=64)
def _kernel(
    window: int | None, softcap: float | None, interpret: bool, heads: int, tokens: int
) -> splash.SplashAttentionKernel:
    """The kernel, cached, since analysing the mask of a long row takes seconds.

    It holds arrays on the host: JAX's own functions would make them on the device that a program is compiled for, which
    may not be present.
    """
    shape, side = (tokens, tokens), math.gcd(tokens, WIDEST)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    whole = masks.MultiHeadMask([mask] * heads)
    info, mask_function = mask_info.process_mask(whole, (side, side))
    info_of_keys, _ = mask_info.process_mask_dkv(whole, (side, side))
    names = (field.name for field in dataclasses.fields(splash.BlockSizes) if field.name.startswith("block"))
    return splash.SplashAttentionKernel(
        info,
        info,
        info_of_keys,
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, side)),
        is_mqa=False,
        save_residuals=True,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=interpret,
    )
