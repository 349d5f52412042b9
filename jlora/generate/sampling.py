"""The next token from logits, and how likely it was."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Settings(NamedTuple):
    """How the next token of each row is chosen, as data: rows that differ share a program.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k, top_p: see `sample`.
        min_p: tokens less likely than this share of the likeliest are left out, after `top_k` and `top_p`; 0 keeps all.
        repetition_penalty: positive logits of tokens that were read or drawn are divided by it, others multiplied
            (Keskar et al. 2019); 1 changes nothing.
        presence_penalty, frequency_penalty: subtracted from the logits of drawn tokens, once and for every time.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]


def sample(
    logits: Float[Array, "B V"], keys: jax.Array, *, temperature: float | jax.Array, top_k: int, top_p: float
) -> Int[Array, "B"]:
    """One token per row, drawn from softmax(logits / temperature) cut to the `top_k` likeliest and the nucleus `top_p`.

    Args:
        keys: one random key per row, so that a row's draw does not depend on its neighbours.
        top_k: how many of the likeliest tokens are kept; 0 keeps all.
        top_p: the smallest set of tokens whose probabilities reach this sum is kept (Holtzman et al. 2019); 1 keeps
            all.
    """
    logits = logits / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        logits = _nucleus(logits, top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def sample_rows(logits: Float[Array, "B V"], keys: jax.Array, settings: Settings) -> Int[Array, "B"]:
    """One token per row, each by its own settings; rows that only `sample` would serve get its tokens.

    Nothing is sorted, and what no row asks for is not computed.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_sampled = settings.temperature > 0
    is_cut = is_sampled & ((settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0))

    def drawn() -> jax.Array:
        scaled = logits / jnp.where(is_sampled, settings.temperature, 1)[:, None]
        scaled = jax.lax.cond(jnp.any(is_cut), lambda: _cut(scaled, settings), lambda: scaled)
        return jnp.where(is_sampled, jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32), likeliest)

    return jax.lax.cond(jnp.any(is_sampled), drawn, lambda: likeliest)


def penalized(
    logits: Float[Array, "B V"], read: Bool[Array, "B V"], drawn: Int[Array, "B V"], settings: Settings
) -> Float[Array, "B V"]:
    """The logits after the settings' penalties.

    Args:
        read: whether the row's prompt has the token.
        drawn: how often the token was drawn since.
    """

    def changed() -> jax.Array:
        penalty = settings.repetition_penalty[:, None]
        repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
        found = jnp.where(read | (drawn > 0), repeated, logits)
        found = found - jnp.where(drawn > 0, settings.presence_penalty[:, None], 0)
        return found - settings.frequency_penalty[:, None] * drawn

    is_changed = (
        (settings.repetition_penalty != 1) | (settings.presence_penalty != 0) | (settings.frequency_penalty != 0)
    )
    return jax.lax.cond(jnp.any(is_changed), changed, lambda: logits)


def log_prob(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"], *, temperature: float | jax.Array
) -> Float[Array, "B"]:
    """log softmax(logits / temperature) of one token per row, in float32, over the whole vocabulary."""
    logits = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def _cut(logits: jax.Array, settings: Settings) -> jax.Array:
    """The logits with -inf for what each row's `top_k`, `top_p` and `min_p` leave out."""
    count = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, logits.shape[-1]), logits.shape[-1])
    logits = _at_least(logits, lambda kept: jnp.sum(kept, axis=-1, dtype=jnp.int32) >= count)
    # A sum that rounding keeps below 1 is never enough, so that nothing is left out.
    probabilities, share = jax.nn.softmax(logits, axis=-1), jnp.where(settings.top_p < 1, settings.top_p, 2)
    logits = _at_least(logits, lambda kept: jnp.sum(jnp.where(kept, probabilities, 0), axis=-1) >= share)
    least = jnp.max(logits, axis=-1) + jnp.log(settings.min_p)
    return jnp.where(logits < least[:, None], -jnp.inf, logits)


def _at_least(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The logits with -inf for those below the largest threshold above which there are enough of them.

    The threshold is found bit by bit: sorting a vocabulary takes a CPU twenty times as long.

    Args:
        enough: whether the tokens of a mask [B, V] are enough, for each row; no more true for a smaller mask.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # rises with the logits

    def halve(bounds: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        is_enough = enough(order >= middle[:, None])
        return (jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)), None

    limits = jnp.iinfo(jnp.int32)
    start = tuple(jnp.full(len(logits), limit, jnp.int32) for limit in (limits.min, limits.max))
    (threshold, _), _ = jax.lax.scan(halve, start, None, length=32)
    return jnp.where(order < threshold[:, None], -jnp.inf, logits)
