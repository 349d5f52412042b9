"""`generate`: prompts in, texts out."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import data
from jlora.data import Prompt
from jlora.errors import UserError
from jlora.generate.asked import as_prompts, choices, one_each
from jlora.generate.decoding import decode
from jlora.generate.rollouts import beyond_positions, faults, queues
from jlora.lora.bank import Bank, Choice, Places, refuse_chosen
from jlora.models import Model
from jlora.types import Params

# Prompts are padded to a multiple of this, so that few shapes are compiled.
BUCKET = 64
# No call of `decode` answers more than this many times `batch_size` prompts, so that progress is visible.
BATCHES = 8


def generate(
    model: Model,
    params: Params | Bank,
    tokenizer: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    adapters: Choice | Sequence[Choice] | None = None,
    chat_template_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    max_new_tokens: int = 64,
    temperature: int | float = 0.0,
    top_k: int = 0,
    top_p: int | float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The text that follows each prompt, without the prompt.

    A text ends where an answer ends (see `jlora.ends.end_ids`), or after `max_new_tokens` tokens. Prompts of similar
    length are decoded together; a text depends on its prompt, its place in `prompts` and the seed, not on which prompts
    share its batch.

    Args:
        params: the model's params, or a bank of adapters.
        prompts: texts, which are continued as they are, or lists of chat messages, which go through the tokenizer's
            chat template. A single prompt counts as a list of one.
        adapters: with a bank, what answers each prompt: an adapter's name, several names with weights, or None for the
            base alone. The default is the base alone for all.
        chat_template_kwargs: for each prompt, what else the template is given, such as tools.
        max_new_tokens: the most new tokens of a text.
        temperature: 0 takes the likeliest token each time.
        top_k, top_p: see `sample`.
        batch_size: how many sequences run at a time.
        on_batch: called with the number of prompts answered so far.

    Returns:
        One text for each prompt, in order; a list even for a single prompt.

    Raises:
        ValueError: settings out of range, an empty prompt, a prompt too long for the positions that the model has
            learned, tokens that it has no row for, or messages for a tokenizer without a chat template.
        KeyError: an adapter that the bank does not hold.
    """
    settings = dict(max_new_tokens=max_new_tokens, top_k=top_k, top_p=float(top_p))
    if problems := faults(settings | dict(temperature=temperature, batch_size=batch_size)):
        raise UserError("generate:\n  " + "\n  ".join(problems))
    tokenizer = data.fitted(tokenizer, model.config.vocab_size)
    prompts = as_prompts(prompts)
    params, places = _places(params, adapters, len(prompts))
    encoded = _encoded(model, tokenizer, prompts, chat_template_kwargs, max_new_tokens)
    longest = max(map(len, encoded), default=0) + max_new_tokens
    model.config.warn_beyond(longest, f"prompts with max_new_tokens={max_new_tokens}")
    stop_ids = data.stop_ids(tokenizer, model.config.eos_token_ids, model.config.vocab_size)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(len(encoded)))
    rows = max(1, min(batch_size, len(encoded)))
    texts, answered = [""] * len(encoded), 0
    room = model.config.positions_before(max_new_tokens)
    for queue in queues(encoded, keys, rows=rows, bucket=BUCKET, room=room, most=BATCHES, tags=_tags(places)):
        filled = queue.numbers + queue.numbers[:1] * (len(queue.tokens) - len(queue.numbers))
        tokens, counts, _ = decode(
            model,
            params,
            queue.tokens,
            queue.lengths,
            queue.keys,
            prompts=queue.prompts,
            copies=queue.copies,
            adapters=None if places is None else tuple(of_prompts[np.array(filled)] for of_prompts in places),
            rows=rows,
            stop_ids=stop_ids,
            greedy=temperature == 0,
            temperature=float(temperature) or 1.0,
            **settings,
        )
        for number, ids, count in zip(queue.numbers, np.asarray(tokens), np.asarray(counts), strict=False):
            texts[number] = tokenizer.decode(ids[:count], skip_special_tokens=True)
        answered += len(queue.numbers)
        if on_batch is not None:
            on_batch(answered)
    return texts


def _places(
    params: Params | Bank, adapters: Choice | Sequence[Choice] | None, count: int
) -> tuple[Params, Places | None]:
    """The params, and which of the bank's adapters answer each prompt."""
    if not isinstance(params, Bank):
        if adapters is not None:
            raise UserError("adapters: found some, expected none without a bank (jlora.lora.Bank) to choose from")
        refuse_chosen(params, "the bank, and adapters= with one choice a prompt")
        return params, None
    return params.params, params.places(choices(adapters, count))


def _tags(places: Places | None) -> list[Hashable] | None:
    """Tags that distinguish equal prompts that are answered by different adapters."""
    if places is None:
        return None
    return [(*map(tuple, of_prompt),) for of_prompt in zip(*map(np.asarray, places), strict=True)]


def _encoded(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    chat_template_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    max_new_tokens: int,
) -> list[list[int]]:
    """The prompts as tokens, each short enough for the new tokens after it."""
    variables: Any = [{}] * len(prompts) if chat_template_kwargs is None else chat_template_kwargs
    variables = one_each("chat_template_kwargs", variables, Mapping, len(prompts))
    encoded = [_encode(tokenizer, *pair, number) for number, pair in enumerate(zip(prompts, variables, strict=True))]
    if too_long := beyond_positions(model, encoded, max_new_tokens):
        raise UserError("generate:\n  " + "\n  ".join(too_long))
    return encoded


def _encode(tokenizer: Any, prompt: Prompt, variables: Mapping[str, Any], number: int) -> list[int]:
    try:
        return data.encode_prompt(prompt, tokenizer, variables)
    except UserError as error:
        raise UserError(f"prompt {number}: {error}") from error
