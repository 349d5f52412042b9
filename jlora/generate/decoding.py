"""The decode loop, all inside one jit: a queue of prompts runs through a few rows, refilled as they finish."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora import lora, quant, sharding
from jlora.errors import UserError, number_of
from jlora.generate.sampling import log_prob, sample
from jlora.models import Cache, Model
from jlora.types import Params


class Decoded(NamedTuple):
    """What follows each prompt.

    Attributes:
        tokens: the new tokens; 0 after the count.
        counts: how many there are. The last one is the first stop token, if that came before `max_new_tokens`.
        log_probs: of each new token under softmax(logits / temperature) over the whole vocabulary: the policy's, before
            `top_k` and `top_p` cut it. 0 after the count.
    """

    tokens: Int[Array, "Q new"]
    counts: Int[Array, "Q"]
    log_probs: Float[Array, "Q new"]


@functools.partial(
    sharding.jit, static_argnames=("model", "rows", "max_new_tokens", "stop_ids", "greedy", "top_k", "top_p")
)
def decode(
    model: Model,
    params: Params,
    tokens: Int[Array, "Q T"],
    lengths: Int[Array, "Q"],
    keys: jax.Array,
    *,
    rows: int,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    greedy: bool,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prompts: Int[Array, "P"] | None = None,
    copies: Int[Array, "Q"] | None = None,
    adapters: tuple[Int[Array, "Q K"], Float[Array, "Q K"]] | None = None,
) -> Decoded:
    """The continuations of Q prompts, at most `rows` of which run at a time.

    A sequence depends on its prompt and its key, not on its place in the queue or on the other rows. Params are used as
    they are: packed, sharded, with adapters beside the base.

    Args:
        tokens: prompts padded on the left.
        lengths: tokens of each prompt; a prompt of length 0 only fills the queue and never runs.
        keys: one random key per prompt.
        rows: the number of sequences at a time; keys and values take memory for this many (and for `prompts`).
        max_new_tokens: the most new tokens of a sequence.
        stop_ids: tokens that end a sequence.
        greedy: take the likeliest token; `top_k` and `top_p` are ignored, and `temperature` applies to log-probs only.
        temperature, top_k, top_p: see `sample`.
        prompts, copies: places in the queue of its distinct prompts, and for every prompt of the queue which of these
            it is. Each distinct prompt is then read once, before the first token is drawn, and kept to the end.
        adapters: if the params are a bank's (`jlora.lora.Bank`), the numbers of each prompt's adapters and their
            weights; copies of a prompt share them.

    Returns:
        The new tokens of each prompt, their counts and their log-probabilities.

    Raises:
        UserError: `adapters` are not for Q prompts.
    """
    if adapters is not None and len(adapters[0]) != len(tokens):
        raise UserError(f"adapters: found those of {number_of(len(adapters[0]), 'prompt')}, expected {len(tokens)}")
    settings = _Settings(max_new_tokens, stop_ids, greedy, temperature, top_k, top_p)
    order = jnp.argsort(lengths == 0, stable=True).astype(jnp.int32)  # prompts before the queue's filling
    params = quant.with_scales(params)
    decoder = _Decoder(model, params, tokens, lengths, keys, order, settings, adapters)
    if prompts is not None:
        decoder = dataclasses.replace(decoder, copies=copies, read=decoder.prefill(prompts))

    def turn(state: _State) -> _State:
        # Two loops rather than one with a branch inside, so that the cache is updated in place and a step has one test.
        state = jax.lax.while_loop(decoder.may_refill, decoder.refill, state)
        return jax.lax.while_loop(lambda state: state.running & ~decoder.may_refill(state), decoder.step, state)

    start = decoder.start(min(rows, len(tokens)))
    return jax.lax.while_loop(lambda state: state.running | (decoder.waiting(state) > 0), turn, start).found


class _Settings(NamedTuple):
    """How the next token is chosen, and which token is the last."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    greedy: bool
    temperature: float | jax.Array
    top_k: int
    top_p: float


class _State(NamedTuple):
    """The state of the queue and its rows.

    Attributes:
        taken: how many prompts have been taken from the queue.
        owners: int32 [B], the number of each row's prompt; Q for a free row.
        steps: int32 [B], how many new tokens each row has.
        last: int32 [B], the newest of them, not in the cache yet.
        cache: T columns for prompts, the others for new tokens.
        found: what has been drawn so far.
    """

    taken: jax.Array
    owners: jax.Array
    steps: jax.Array
    last: jax.Array
    cache: Cache
    found: Decoded

    @property
    def free(self) -> Bool[Array, "B"]:
        return self.owners == len(self.found.counts)

    @property
    def running(self) -> Bool[Array, ""]:
        return ~jnp.all(self.free)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """The queue and the operations on it.

    Attributes:
        adapters: numbers and weights of each prompt's adapters, if the params are a bank's.
        copies, read: which of the prompts read beforehand each one is, and the result of `prefill` for those.
    """

    model: Model
    params: Params
    tokens: jax.Array
    lengths: jax.Array
    keys: jax.Array
    order: jax.Array
    settings: _Settings
    adapters: tuple[jax.Array, jax.Array] | None = None
    copies: jax.Array | None = None
    read: tuple[jax.Array, Cache] | None = None

    def start(self, rows: int) -> _State:
        """The initial state: nothing taken, every row free."""
        (queue, width), new = self.tokens.shape, self.settings.max_new_tokens
        cache = self.model.empty_cache(self.params, rows, width + new - 1)  # the last token is never read
        if rows < queue:  # otherwise all rows start together, and one length serves all
            cache = dataclasses.replace(cache, length=jnp.full(rows, width, jnp.int32))
        shape = (queue, new)
        found = Decoded(jnp.zeros(shape, jnp.int32), jnp.zeros(queue, jnp.int32), jnp.zeros(shape, jnp.float32))
        zeros = jnp.zeros(rows, jnp.int32)
        return _State(jnp.int32(0), zeros + queue, zeros, zeros, cache, found)

    def waiting(self, state: _State) -> Int[Array, ""]:
        """How many prompts have not been taken."""
        return jnp.sum(self.lengths > 0, dtype=jnp.int32) - state.taken

    def may_refill(self, state: _State) -> Bool[Array, ""]:
        """Whether enough rows are free: a refill costs the same for one prompt as for all that it can take."""
        waiting = self.waiting(state)
        return (waiting > 0) & (jnp.sum(state.free) >= jnp.minimum(self._refills(state), waiting))

    def refill(self, state: _State) -> _State:
        """Puts the next prompts into free rows, each with its first new token."""
        queue = len(self.tokens)
        count = self._refills(state)
        (rows,) = jnp.nonzero(state.free, size=count, fill_value=len(state.owners))
        numbers = state.taken + jnp.arange(count, dtype=jnp.int32)
        real = numbers < state.taken + self.waiting(state)
        owners = jnp.where(real, self.order.at[numbers].get(mode="clip"), queue)
        rows = jnp.where(real, rows, len(state.owners))  # out of range: written nowhere
        if self.read is None:
            last, cache = self.prefill(owners)
        else:
            which = self.copies.at[owners].get(mode="clip")
            last, cache = self.read[0].at[which].get(mode="clip"), self.read[1].take(which)
        zeros = jnp.zeros(count, jnp.int32)
        token, done, found = self._draw(state.found, owners, zeros, last)
        return _State(
            state.taken + jnp.sum(real, dtype=jnp.int32),
            state.owners.at[rows].set(jnp.where(done, queue, owners), mode="drop"),
            state.steps.at[rows].set(zeros + 1, mode="drop"),
            state.last.at[rows].set(token, mode="drop"),
            state.cache.put(rows, cache),
            found,
        )

    def prefill(self, numbers: Int[Array, "R"]) -> tuple[jax.Array, Cache]:
        """(the last hidden states [R, D], the cache) of these prompts of the queue; numbers out of range: padding."""
        width = self.tokens.shape[1]
        lengths = self.lengths.at[numbers].get(mode="fill", fill_value=0)
        columns = jnp.arange(width, dtype=jnp.int32)[None, :]
        padding = width - lengths[:, None]
        positions, segment_ids = jnp.maximum(columns - padding, 0), (columns >= padding).astype(jnp.int32)
        prompts = self.tokens.at[numbers].get(mode="clip")
        cache = self.model.empty_cache(self.params, len(numbers), width)
        params = self._params_of(numbers)
        hidden, cache = self.model.hidden(params, prompts, positions, segment_ids, cache=cache, branches=False)
        return hidden[:, -1], cache

    def step(self, state: _State) -> _State:
        """Draws one more token in every row. The results of free rows are never read."""
        lengths = self.lengths.at[state.owners].get(mode="clip")
        positions = (lengths + state.steps - 1)[:, None]
        params = self._params_of(state.owners)
        hidden, cache = self.model.hidden(
            params, state.last[:, None], positions, jnp.ones_like(positions), cache=state.cache, branches=False
        )
        token, done, found = self._draw(state.found, state.owners, state.steps, hidden[:, 0])
        # A free row's steps do not advance, so that its positions stay within the model's.
        steps = jnp.where(state.free, state.steps, state.steps + 1)
        return _State(state.taken, jnp.where(done, len(self.tokens), state.owners), steps, token, cache, found)

    def _params_of(self, numbers: Int[Array, "B"]) -> Params:
        """The params for rows with these prompts: a bank's adapters chosen for each."""
        if self.adapters is None:
            return self.params
        return lora.choose(self.params, *(of_prompts.at[numbers].get(mode="clip") for of_prompts in self.adapters))

    def _refills(self, state: _State) -> int:
        """How many prompts a refill takes at most."""
        rows = len(state.owners)
        return rows if rows == len(self.tokens) else max(1, rows // 4)

    def _draw(
        self, found: Decoded, owners: jax.Array, steps: jax.Array, hidden: jax.Array
    ) -> tuple[jax.Array, jax.Array, Decoded]:
        """(the tokens after `hidden`, whether each is its sequence's last, `found` with these tokens added)."""
        settings = self.settings
        logits = self.model.logits(self._params_of(owners), hidden)
        if settings.greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            keys = jax.vmap(jax.random.fold_in)(self.keys.at[owners].get(mode="clip"), steps)
            token = sample(logits, keys, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        done = steps + 1 == settings.max_new_tokens
        for stop in settings.stop_ids:
            done = done | (token == stop)
        return (
            token,
            done,
            Decoded(
                found.tokens.at[owners, steps].set(token, mode="drop"),
                found.counts.at[owners].set(steps + 1, mode="drop"),
                found.log_probs.at[owners, steps].set(
                    log_prob(logits, token, temperature=settings.temperature), mode="drop"
                ),
            ),
        )
