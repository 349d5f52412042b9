"""Records to tokens: the tokenizer's own chat template, and which tokens the loss counts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int32

from jlora.data.records import Note, OnError, Record, settle_faults, warn
from jlora.data.template import (
    as_messages,
    common_prefix,
    end_with_eos,
    render,
    rendered_tokens,
    require_template,
    template_stop,
    template_variables,
    text_tokens,
)
from jlora.errors import UserError

Encoded = TypeVar("Encoded")

# In the place of a turn's words it shows where they stand in what a template writes.
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document: its tokens, and for each whether the loss is taken on predicting it."""

    tokens: Int32[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """What became of the records: counts of the examples kept, and of what was cut or left out.

    Args:
      examples, tokens, trained_tokens: what is kept (of preference data an example is an `Item`).
      kept: index of the record of each example.
      cut: examples kept that lost their end.
      dropped: records left out because they were too long.
      untrained: records left out because they would teach nothing after cutting: a document of theirs has no token
        that is trained, or their documents are all alike.
    """

    examples: int
    tokens: int
    trained_tokens: int
    kept: tuple[int, ...]
    cut: int
    dropped: int
    untrained: int


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    seq_len: int,
    overlong: str = "drop",
    completion_only: bool = True,
    end: bool = True,
    on_error: OnError = "raise",
    note: Note = warn,
) -> tuple[list[Example], EncodeReport]:
    """Examples for the records that can be trained on, in order, and a report of what was left out.

    The loss counts every assistant turn of `messages`, and the completion of a prompt, each with the token that ends
    it, so that the model learns to stop. Nothing behind the last counted token is kept.

    Args:
        end: without it no end-of-text token is added; what a chat template writes behind a turn counts all the same.
        on_error, note: see `encode_all`.
    """
    chats = sum(not _is_text(record) for record in records)
    require_template(tokenizer, chats, len(records))
    stop = template_stop(tokenizer) if chats else None

    def one(record: Record) -> tuple[Example, ...]:
        tokens, trained = _encode_record(record, tokenizer, stop, end)
        length = int(np.flatnonzero(trained)[-1]) + 1 if trained.any() else 0
        return (Example(tokens[:length], trained[:length] | (not completion_only)),)

    kept, report = select(records, one, seq_len=seq_len, overlong=overlong, on_error=on_error, note=note)
    return [example for _, (example,) in kept], report


def select(
    records: Sequence[Record],
    encode_record: Callable[[Record], tuple[Example, ...]],
    *,
    seq_len: int,
    overlong: str,
    on_error: OnError = "raise",
    note: Note = warn,
) -> tuple[list[tuple[Record, tuple[Example, ...]]], EncodeReport]:
    """(record, its documents) of the records that can be trained on, none longer than `seq_len`, and a report.

    A record is kept or left out as a whole.

    Raises:
        ValueError: a record cannot be encoded, is too long where `overlong` is "error", or nothing remains.
    """

    def one(record: Record) -> tuple[Example, ...]:
        documents = encode_record(record)
        if overlong == "error" and (longest := max(len(document.tokens) for document in documents)) > seq_len:
            raise UserError(f"found {longest} tokens, expected at most {seq_len}")
        return documents

    kept, places = [], []
    cut = dropped = untrained = 0
    for index, documents in encode_all(records, one, on_error=on_error, note=note):
        if too_long := max(len(document.tokens) for document in documents) > seq_len:
            if overlong == "drop":
                dropped += 1
                continue
            documents = tuple(Example(d.tokens[:seq_len], d.trained[:seq_len]) for d in documents)
        if not all(d.trained[1:].any() for d in documents) or _alike(documents):  # nothing predicts the first token
            untrained += 1
            continue
        cut += too_long
        kept.append((records[index], documents))
        places.append(index)
    if not kept:
        raise UserError(
            f"no token to train on in {len(records)} records: {dropped} are longer than {seq_len} tokens and were "
            f"dropped, {untrained} have no completion token within {seq_len} tokens; raise train.seq_len"
        )
    documents = [document for _, documents in kept for document in documents]
    return kept, EncodeReport(
        examples=len(kept),
        tokens=sum(len(document.tokens) for document in documents),
        trained_tokens=sum(int(document.trained[1:].sum()) for document in documents),
        kept=tuple(places),
        cut=cut,
        dropped=dropped,
        untrained=untrained,
    )


def encode_all(
    records: Sequence[Record],
    encode_record: Callable[[Record], Encoded],
    *,
    noun: str = "records",
    on_error: OnError = "raise",
    note: Note = warn,
) -> list[tuple[int, Encoded]]:
    """(index, what `encode_record` makes of it) of each record, in order.

    Args:
        on_error: "raise", or "skip": records that cannot be encoded are left out, and `note` is told.

    Raises:
        UserError: records cannot be encoded; all are named, those of one kind once.
    """
    found, faults = [], []
    for index, record in enumerate(records):
        try:
            found.append((index, encode_record(record)))
        except UserError as error:
            faults.append((f"record {index + 1}", str(error)))
    title = f"{len(faults)} of {len(records)} {noun} cannot be encoded"
    settle_faults(title, faults, len(found), on_error, note)
    return found


def encodable(
    records: Sequence[Record], tokenizer: Any, *, on_error: OnError = "raise", note: Note = warn
) -> list[Record]:
    """The records that can be encoded, whatever their length; the others are refused or noted, see `encode_all`."""
    chats = sum(not _is_text(record) for record in records)
    require_template(tokenizer, chats, len(records))
    stop = template_stop(tokenizer) if chats else None
    found = encode_all(
        records, lambda record: _encode_record(record, tokenizer, stop, True), on_error=on_error, note=note
    )
    return [records[index] for index, _ in found]


def split_prompt(record: Record) -> tuple[str | list[dict[str, Any]], str]:
    """The prompt to generate from, and the text that the record gives as the answer.

    With messages the answer is the last assistant message and the prompt is everything before it.
    """
    if _is_text(record):
        return record["prompt"], record["completion"]
    messages, _ = _conversation(record)
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last].get("content") or ""


def _is_text(record: Record) -> bool:
    return "messages" not in record and isinstance(record["prompt"], str) and isinstance(record["completion"], str)


def _conversation(record: Record) -> tuple[list[dict[str, Any]], int]:
    """All messages, and the index of the first that may be trained."""
    if "messages" in record:
        return record["messages"], 0
    prompt = as_messages(record["prompt"], "user")
    return prompt + as_messages(record["completion"], "assistant"), len(prompt)


def _encode_record(record: Record, tokenizer: Any, stop: int | None, end: bool) -> tuple[np.ndarray, np.ndarray]:
    if _is_text(record):
        return _encode_text(record["prompt"], record["completion"], tokenizer, end)
    messages, first = _conversation(record)
    template = functools.partial(render, tokenizer=tokenizer, variables=template_variables(record))
    text = template(messages)
    tokens = rendered_tokens(text, tokenizer)
    if end and stop is None and messages[-1]["role"] == "assistant":
        tokens = end_with_eos(tokens, tokenizer)
    trained = np.zeros(len(tokens), np.bool_)
    for index in range(first, len(messages)):
        if messages[index]["role"] == "assistant":
            trained[slice(*turn(messages, index, text, tokens, tokenizer, template, stop))] = True
    return tokens, trained


def _encode_text(prompt: str, completion: str, tokenizer: Any, end: bool) -> tuple[np.ndarray, np.ndarray]:
    tokens = text_tokens(prompt + completion, tokenizer, end=end)
    trained = np.arange(len(tokens)) >= common_prefix(text_tokens(prompt, tokenizer), tokens)
    return tokens, trained


def turn(
    messages: list[dict[str, Any]],
    index: int,
    text: str,
    tokens: np.ndarray,
    tokenizer: Any,
    template: Callable[..., str],
    stop: int | None,
) -> tuple[int, int]:
    """Where the assistant turn `messages[index]` starts and ends (exclusive, its stop token inside) in `tokens`, those
    of `text`.
    """

    def shared(part: str) -> int:
        return common_prefix(rendered_tokens(part, tokenizer), tokens)

    asked = template(messages[:index], add_generation_prompt=True)
    known = text.startswith(asked)
    if not known:  # what asks for an answer may say more than stands before one
        known = text.startswith(template(messages[:index]))
    if known:
        start = shared(asked)
    else:  # what comes before reads otherwise without the rest: the turn is what changes with its words
        other = {"content": MARK} | {name: MARK for name in ("reasoning_content",) if messages[index].get(name)}
        changed = template([*messages[:index], messages[index] | other, *messages[index + 1 :]])
        first = _alike_for(text, changed)
        start = shared(text[:first])
    # Some templates leave the reasoning out of earlier turns, so a prefix that is shared with a shorter chat may end
    # inside the turn. That is the answer only where there is no stop token to look for.
    stops = np.flatnonzero(tokens[start:] == stop) if stop is not None else []
    if len(stops):
        return start, start + int(stops[0]) + 1
    if index + 1 == len(messages):
        return start, len(tokens)
    if known:
        return start, shared(template(messages[: index + 1]))
    return start, shared(text[: len(text) - _alike_for(text[first:][::-1], changed[first:][::-1])])


def _alike(documents: tuple[Example, ...]) -> bool:
    first, *others = (document.tokens for document in documents)
    return bool(others) and all(np.array_equal(first, other) for other in others)


def _alike_for(first: str, second: str) -> int:
    """How many leading characters are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
