"""Recurrences with a matrix of state for each head, and causal convolutions, over rows that hold several documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jlora import sharding
from jlora.errors import UserError
from jlora.kernels.recurrence import chunked, plain
from jlora.kernels.recurrence.convolution import convolve
from jlora.kernels.recurrence.runs import Runs, last_segment
from jlora.types import SAVED

__all__ = ["AUTO", "FORMS", "Runs", "convolve", "last_segment", "recur"]

AUTO = "auto"
FORMS: dict[str, Callable] = {"plain": plain.forward, "chunked": chunked.forward}
# The mesh axes of heads [B, T, heads, …] when linears compute them, and during the recurrence.
TOKENS_SPLIT = (sharding.ROWS, sharding.TOKENS, sharding.FEATURES)
HEADS_SPLIT = (sharding.ROWS, None, sharding.HEADS)


def recur(
    queries: Float[Array, "B T K F"],
    keys: Float[Array, "B T K F"],
    values: Float[Array, "B T H V"],
    decays: Float[Array, "B T H"],
    rates: Float[Array, "B T H"] | None,
    runs: Runs,
    state: Float[Array, "B H F V"] | None = None,
    form: str = AUTO,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """(what each token reads, in the values' dtype, the state after each row's last token, float32).

    A head's state S begins at 0 in each document. At each token:

        S ← exp(decay) · S
        S ← S + k ⊗ rate · (v - kᵀS)   with rates: the gated delta rule (Yang et al. 2024)
        S ← S + k ⊗ v                  without them: Mamba-2's recurrence (Dao and Gu 2024)
        y = qᵀS

    Padding changes no state, and reads zeros.

    Args:
        queries, keys: each of them serves H/K neighbouring heads of values.
        decays: logarithms, at most 0.
        runs: which tokens belong together.
        state: that after the calls before this; default 0.
        form: a name of FORMS, or "auto" for the best one.

    Raises:
        UserError: there is no such form.
    """
    batch, tokens, heads, width = keys.shape
    if form == AUTO:
        form = "plain" if tokens == 1 else "chunked"
    if form not in FORMS:
        raise UserError(f"found the form of recurrences {form!r}; expected one of {', '.join((AUTO, *FORMS))}")
    dtype = values.dtype
    arrays = [_whole(x) for x in (queries, keys, values, decays)]
    rates = None if rates is None else _whole(rates)
    # Ahead of the heads' own axis, that of the heads that share a key.
    queries, keys, values, decays = (*arrays[:2], *(_grouped(x, heads, axis=2) for x in arrays[2:]))
    rates = None if rates is None else _grouped(rates, heads, axis=2)
    if state is None:
        state = jnp.zeros((batch, values.shape[2] * values.shape[3], width, values.shape[-1]), jnp.float32)
    y, state = FORMS[form](queries, keys, values, decays, rates, runs, _grouped(state, heads, axis=1))
    y = checkpoint_name(y.reshape(batch, tokens, -1, y.shape[-1]).astype(dtype), SAVED)
    return _split(y), state.reshape(batch, -1, *state.shape[3:])


def _whole(x: jax.Array) -> jax.Array:
    """All tokens of some heads on every device."""
    return sharding.constrain(x, *HEADS_SPLIT, *(None,) * (x.ndim - 3))


def _split(x: jax.Array) -> jax.Array:
    return sharding.constrain(sharding.constrain(x, *HEADS_SPLIT, None), *TOKENS_SPLIT, None)


def _grouped(x: jax.Array, heads: int, axis: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])
