"""Causal convolutions of each channel by itself, which end where a document ends."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora import sharding
from jlora.errors import UserError
from jlora.kernels.order import after, constant
from jlora.kernels.recurrence.runs import NONE, Runs


def convolve(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "W D"],
    runs: Runs,
    bias: Float[Array, "D"] | None = None,
    tail: Float[Array, "B W-1 D"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """(Σ_w kernel[w] · (the token W-1-w before) (+ bias) in x's dtype, the last W-1 tokens of each row's document).

    Tokens before a document's start are zeros. Sums are float32.

    Args:
        tail: the second result of the calls before this; default zeros.

    Raises:
        UserError: the kernel has only one tap.
    """
    taps = kernel.shape[0] - 1
    if taps < 1:
        raise UserError(f"found a convolution of width {kernel.shape[0]}; expected at least 2")
    x = sharding.constrain(x, sharding.ROWS, None, sharding.HEADS)  # every device has all tokens of some channels
    rooms = jnp.zeros((x.shape[0], taps, x.shape[2]), x.dtype) if tail is None else tail.astype(x.dtype)
    extended = jnp.concatenate([rooms, x], axis=1)
    before = _before(runs, taps)
    if tail is None and not runs.branches:
        earlier = _shifted(x, runs, taps)
    else:
        earlier = _gathered(extended, before, taps)
    kernel = kernel.astype(jnp.float32)[:, None, None]
    y = x.astype(jnp.float32) * kernel[-1]
    for distance, part in enumerate(earlier, start=1):
        y = y + part.astype(jnp.float32) * kernel[-1 - distance]
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, None]
    return y.astype(x.dtype), _tail(extended, before, runs, taps)


def _shifted(x: jax.Array, runs: Runs, taps: int) -> list[jax.Array]:
    """The token 1, 2, … places before each: that of its document, if no padding lies between its tokens."""
    # Otherwise masks as wide as x would be made before the loop over layers, and kept.
    run, still = after(runs.run, jax.lax.stop_gradient(x))
    zero, found = constant(0.0, still, x.dtype), []
    for distance in range(1, taps + 1):
        room = [(0, 0), (distance, 0)]
        earlier = jnp.pad(run, room)[:, : x.shape[1]]
        same = (earlier == run) & (earlier > 0)
        found.append(jnp.where(same[..., None], jnp.pad(x, [*room, (0, 0)])[:, : x.shape[1]], zero))
    return found


def _gathered(extended: jax.Array, before: jax.Array, taps: int) -> list[jax.Array]:
    """The token 1, 2, … before each in its document."""
    places = jnp.arange(taps, extended.shape[1], dtype=jnp.int32)
    ancestors = _ancestors(before, jnp.broadcast_to(places, (len(extended), len(places))), taps)
    return [_tokens(extended, places) for places in ancestors]


def _tail(extended: jax.Array, before: jax.Array, runs: Runs, taps: int) -> jax.Array:
    """The last `taps` tokens of the document that each row ends with; the old tail where a row has only padding."""
    places = jnp.arange(taps, extended.shape[1], dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(runs.run > 0, places, taps - 1), axis=1, keepdims=True)
    found = [last, *_ancestors(before, last, taps - 1)]
    return _tokens(extended, jnp.concatenate(found[::-1], axis=1))


def _before(runs: Runs, taps: int) -> jax.Array:
    """For each token of a tail and then of a row, the place of the one before it in its document; -1 for none."""
    tail = jnp.broadcast_to(jnp.arange(-1, taps - 1, dtype=jnp.int32), (len(runs.before), taps))
    return jnp.concatenate([tail, jnp.where(runs.before == NONE, -1, runs.before + taps)], axis=1)


def _ancestors(before: jax.Array, places: jax.Array, count: int) -> list[jax.Array]:
    """The places of the tokens 1, 2, …, `count` before those at these places; -1 for none."""
    found = []
    for _ in range(count):
        places = jnp.where(places < 0, -1, jnp.take_along_axis(before, jnp.maximum(places, 0), axis=1))
        found.append(places)
    return found


def _tokens(x: jax.Array, places: jax.Array) -> jax.Array:
    """The tokens of [B, T, D] at these places; zeros at -1."""
    found = jnp.take_along_axis(x, jnp.maximum(places, 0)[..., None], axis=1)
    return jnp.where((places < 0)[..., None], 0, found)
