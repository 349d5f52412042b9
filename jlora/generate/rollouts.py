"""Completions of token prompts, with what a policy-gradient trainer needs to know about them."""

import functools
import math
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jlora import lora, sharding, tree
from jlora.errors import UserError, first_few, number_of
from jlora.generate.decoding import Decoded, decode
from jlora.lora.bank import refuse_chosen
from jlora.models import Model
from jlora.types import Params


class Completion(NamedTuple):
    """What was drawn after a prompt.

    Attributes:
        tokens: int32, including the stop token if it was reached.
        log_probs: float32, of each token under softmax(logits / temperature) over the whole vocabulary: the policy's,
            before `top_k` and `top_p` cut it.
        finished: whether the stop token was reached.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    finished: bool


class Rollout(NamedTuple):
    """Completions in the order of their prompts, and the `policy_digest` of the adapters that drew them."""

    completions: list[Completion]
    policy_digest: int


class Queue(NamedTuple):
    """One call of `decode`.

    Attributes:
        numbers: indices of these prompts among all prompts.
        tokens: int32 [Q, T], padded on the left.
        lengths: int32 [Q]; 0 for entries that only fill the queue.
        keys: [Q].
        prompts: int32 [P], places in the queue of its distinct prompts, if reading these beforehand pays: P is at most
            half the number of prompts, and at most the rows. P is a power of two; unused entries are Q. Else None.
        copies: int32 [Q], each prompt's index in `prompts`; None if that is None.
    """

    numbers: list[int]
    tokens: np.ndarray
    lengths: np.ndarray
    keys: jax.Array
    prompts: np.ndarray | None
    copies: np.ndarray | None


def rollout(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    *,
    rows: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: int | float = 1.0,
    top_k: int = 0,
    top_p: int | float = 1.0,
    bucket: int = 64,
) -> Rollout:
    """A sampled completion of every prompt, up to and including a stop token, or of `max_new_tokens` tokens.

    A completion depends on its prompt and its key, not on the other prompts.

    Args:
        prompts: token ids.
        keys: one random key per prompt.
        rows: how many sequences run at a time.
        max_new_tokens: the most tokens of a completion.
        stop_ids: tokens that end a completion.
        temperature: 0 takes the likeliest token each time; log-probabilities are then those at temperature 1.
        top_k, top_p: see `sample`.
        bucket: prompts are padded to a multiple of this many tokens.

    Returns:
        The completions in the order of the prompts, and the digest of the adapters that drew them.

    Raises:
        ValueError: no prompts, prompts or keys that do not fit, or settings out of range; all are listed. Or the params
            are those of `Bank.choose`.
    """
    settings = dict(max_new_tokens=max_new_tokens, top_k=top_k, top_p=float(top_p))
    checked = settings | dict(rows=rows, bucket=bucket, temperature=temperature)
    problems = faults(checked) + _unfit(model, prompts, keys, max_new_tokens)
    if problems:
        raise UserError("rollout:\n  " + "\n  ".join(problems))
    refuse_chosen(params, "those of Bank.alone")
    rows = min(rows, len(prompts))
    settings |= dict(rows=rows, stop_ids=tuple(stop_ids))
    settings |= dict(greedy=temperature == 0, temperature=float(temperature) or 1.0)
    room = model.config.positions_before(max_new_tokens)
    calls = list(queues(prompts, keys, rows=rows, bucket=bucket, room=room))
    drawn = [_draw(model, params, *queue[1:], **settings) for queue in calls]
    drawn = jax.device_get(drawn)
    completions = {}
    for queue, (decoded, _) in zip(calls, drawn, strict=True):
        for number, tokens, count, log_probs in zip(queue.numbers, *decoded, strict=False):
            finished = int(tokens[count - 1]) in stop_ids
            completions[number] = Completion(tokens[:count], log_probs[:count], finished)
    return Rollout([completions[number] for number in range(len(prompts))], int(drawn[0][1]))


def policy_digest(trainable: Params) -> UInt32[Array, ""]:
    """A number that changes with any one weight, name or shape of the trainable leaves, but not with their sharding.

    `lora.split(params)[1]` gives the trainable leaves of a whole tree. The number is the same in every jit.
    """
    total = jnp.uint32(0)
    for path, leaf in tree.flatten(trainable).items():
        name = jnp.uint32(zlib.crc32(f"{path} {leaf.shape} {leaf.dtype}".encode()) | 1)
        for part in tree.digest(leaf):
            total += name * (part + jnp.uint32(1))
    return total


def queues(
    prompts: Sequence[Sequence[int]],
    keys: jax.Array,
    *,
    rows: int,
    bucket: int,
    room: int | None = None,
    most: int | None = None,
    tags: Sequence[Hashable] | None = None,
) -> Iterator[Queue]:
    """The prompts from short to long, in queues that each pad their prompts to one multiple of `bucket`.

    A queue is filled up to `rows` times a power of two, so that few shapes are compiled. It holds more than `rows`
    prompts only if those are padded alike: short prompts do not wait for long ones, and no row runs alone for long. If
    prompts repeat, a queue is kept short enough for its distinct prompts to be read beforehand.

    Args:
        room: the most tokens that prompts are padded to, if the model's positions are limited.
        most: the most prompts of a queue, in multiples of `rows`.
        tags: one for each prompt; equal prompts with different tags count as different.
    """
    tagged = [(tuple(prompt), tags[number] if tags else None) for number, prompt in enumerate(prompts)]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    widths = [-(-len(prompts[batch[-1]]) // bucket) * bucket for batch in batches]
    if room is not None:
        widths = [max(len(prompts[batch[-1]]), min(width, room)) for batch, width in zip(batches, widths, strict=True)]
    repeated = len(prompts) // max(1, len(set(tagged)))
    if repeated > 2:  # (repeated - 1) · rows prompts hold at most `rows` distinct ones
        most = min(repeated - 1, most or repeated)
    start = 0
    while start < len(batches):
        end = start + widths[start:].count(widths[start])
        end = end if most is None else min(end, start + most)
        numbers = [number for batch in batches[start:end] for number in batch]
        size = rows * 2 ** (end - start - 1).bit_length()
        tokens, lengths = np.zeros((size, widths[start]), np.int32), np.zeros(size, np.int32)
        for row, number in enumerate(numbers):
            lengths[row] = len(prompts[number])
            tokens[row, widths[start] - lengths[row] :] = prompts[number]
        filled = np.array(numbers + numbers[:1] * (size - len(numbers)))
        yield Queue(numbers, tokens, lengths, keys[filled], *_different([tagged[n] for n in numbers], size, rows))
        start = end


def _different(prompts: list[Hashable], size: int, rows: int) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """`Queue.prompts` and `Queue.copies` for a queue of this size that begins with these prompts."""
    first: dict[Hashable, int] = {}
    copies = [first.setdefault(prompt, len(first)) for prompt in prompts]
    padded = 1 << (len(first) - 1).bit_length()
    if padded > min(rows, len(prompts) // 2):
        return None, None
    places = [copies.index(number) for number in range(len(first))]
    filled = np.array(places + [size] * (padded - len(places)), np.int32)
    return filled, np.array(copies + [0] * (size - len(copies)), np.int32)


def beyond_positions(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """A line on the prompts that leave the model too few positions for `max_new_tokens`; [] if there are none."""
    room = model.config.positions_before(max_new_tokens)
    longer = [] if room is None else [number for number, prompt in enumerate(prompts) if len(prompt) > room]
    if not longer:
        return []
    return [
        f"too long for {max(room, 0)} tokens: {len(longer)} of {number_of(len(prompts), 'prompt')} "
        f"({first_few(longer)}), the longest has {max(map(len, prompts))}: {model.config.model_type} has learned "
        f"{model.config.max_position_embeddings} positions, and max_new_tokens={max_new_tokens}"
    ]


def _unfit(model: Model, prompts: Sequence[Sequence[int]], keys: jax.Array, max_new_tokens: int) -> list[str]:
    """A line for each reason why the prompts cannot be sampled from."""
    problems = beyond_positions(model, prompts, max_new_tokens)
    if not prompts:
        problems.append("no prompts: expected at least one")
    if empty := [number for number, prompt in enumerate(prompts) if not len(prompt)]:
        problems.append(f"empty prompts {empty}: expected at least one token in each")
    if keys.shape != (len(prompts),):
        problems.append(f"keys of shape {keys.shape}: expected one for each of {number_of(len(prompts), 'prompt')}")
    if beyond := model.without_row(prompts):
        problems.append(f"prompts: {beyond}")
    return problems


@functools.partial(
    sharding.jit, static_argnames=("model", "greedy", "rows", "max_new_tokens", "stop_ids", "top_k", "top_p")
)
def _draw(
    model: Model,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    prompts: jax.Array | None,
    copies: jax.Array | None,
    *,
    temperature: float | jax.Array,
    greedy: bool,
    **static: Any,
) -> tuple[Decoded, jax.Array]:
    """The continuations of the prompts, and the digest of the very arrays that drew them."""
    static |= dict(prompts=prompts, copies=copies)
    decoded = decode(model, params, tokens, lengths, keys, greedy=greedy, temperature=temperature, **static)
    return decoded, policy_digest(lora.split(params)[1])


def faults(settings: dict[str, int | float]) -> list[str]:
    """A line for every setting that is out of range."""
    return [
        f"{name}={value}: expected {_EXPECTED[name][0]}"
        for name, value in settings.items()
        if not _EXPECTED[name][1](value)
    ]


_EXPECTED: dict[str, tuple[str, Callable[[int | float], bool]]] = {
    "max_new_tokens": ("1 or more", lambda value: value >= 1),
    "temperature": ("0 (greedy) or more", lambda value: 0 <= value < math.inf),
    "top_k": ("0 (off) or more", lambda value: value >= 0),
    "top_p": ("a probability in (0, 1]", lambda value: 0 < value <= 1),
    "min_p": ("0 (off) to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("more than 0 (1 is off)", lambda value: 0 < value < math.inf),
    "presence_penalty": ("-2 to 2", lambda value: -2 <= value <= 2),
    "frequency_penalty": ("-2 to 2", lambda value: -2 <= value <= 2),
    "batch_size": ("1 or more", lambda value: value >= 1),
    "rows": ("1 or more", lambda value: value >= 1),
    "bucket": ("1 or more", lambda value: value >= 1),
}
