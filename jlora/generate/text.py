"""Prompts in, texts out."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.generate.decode import decode
from jlora.models import Model
from jlora.types import Params

Prompt = str | Sequence[dict[str, Any]]
# Prompts are padded to a multiple of this, so that few shapes are compiled.
BUCKET = 64


def generate(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: int | float = 0.0,
    top_k: int = 0,
    top_p: int | float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The text that follows each prompt, without it, up to the model's stop token or `max_new_tokens`.

    Prompts of like length are decoded together; a text depends on its prompt, its place in `prompts` and the seed, not
    on which prompts share its batch.

    Args:
        prompts: texts, continued as they are, or lists of chat messages, put through the tokenizer's chat template.
        temperature: 0 takes the likeliest token each time.
        top_k, top_p: see `sample`.
        on_batch: called with the number of prompts answered so far.

    Raises:
        ValueError: settings out of range, an empty prompt, or messages for a tokenizer without a chat template.
    """
    _check(max_new_tokens, temperature, top_k, top_p, batch_size)
    encoded = [_encode(tokenizer, prompt, number) for number, prompt in enumerate(prompts)]
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]))
    stop_ids = tuple(sorted({*model.config.eos_token_ids, tokenizer.eos_token_id} - {None}))
    texts = [""] * len(encoded)
    batch_size = min(batch_size, len(encoded))
    for start in range(0, len(order), batch_size or 1):
        rows = order[start : start + batch_size]
        tokens, lengths = _pad([encoded[number] for number in rows], batch_size)
        keys = jnp.stack(
            [jax.random.fold_in(jax.random.key(seed), number) for number in rows + rows[:1] * (batch_size - len(rows))]
        )
        new, counts = decode(
            model,
            params,
            tokens,
            lengths,
            keys,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            greedy=temperature == 0,
            temperature=float(temperature) or 1.0,
            top_k=top_k,
            top_p=float(top_p),
        )
        for number, ids, count in zip(rows, np.asarray(new), np.asarray(counts), strict=False):
            texts[number] = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if on_batch is not None:
            on_batch(start + len(rows))
    return texts


def _encode(tokenizer: Any, prompt: Prompt, number: int) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif not tokenizer.chat_template:
        raise ValueError(f"prompt {number} is a list of messages, but the tokenizer has no chat template: give a text")
    else:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt {number} is empty: there is nothing to continue")
    return ids


def _pad(rows: list[list[int]], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, T] padded on the left, lengths [B]); rows that only fill the batch have length 0 and never run."""
    width = -(-max(map(len, rows)) // BUCKET) * BUCKET
    tokens = np.zeros((batch_size, width), np.int32)
    lengths = np.zeros(batch_size, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, width - len(ids) :] = ids
        lengths[row] = len(ids)
    return tokens, lengths


def _check(max_new_tokens: int, temperature: int | float, top_k: int, top_p: int | float, batch_size: int) -> None:
    problems = [
        f"{name}={value}: expected {expected}"
        for name, value, good, expected in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
            ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0, "0 (off) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "a probability in (0, 1]"),
            ("batch_size", batch_size, batch_size >= 1, "1 or more"),
        )
        if not good
    ]
    if problems:
        raise ValueError("generate:\n  " + "\n  ".join(problems))
