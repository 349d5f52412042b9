"""Prompts for online learning: records to generate from, and their tokens."""

import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.data.chat import EncodeReport, Progress, answer_text, encode_all, split_prompt
from jlora.data.forms import (
    answer,
    asks,
    media_faults,
    normal_row,
    question,
    question_keys,
    unused_keys,
    unused_template_fields,
    with_system,
)
from jlora.data.found import Form, chat_form
from jlora.data.messages import kind_of, message_faults, side_faults
from jlora.data.notes import Note, as_notes, warn
from jlora.data.paths import Where
from jlora.data.records import Accepted, Counted, OnError, Placed, Record, iterate_rows
from jlora.data.rendered import write
from jlora.data.sources import Sources
from jlora.data.store import Example, Item, Items
from jlora.data.template import template_variables
from jlora.data.tokens import Encoding, Text, encode_alone, plain_text
from jlora.data.writer import Writer
from jlora.errors import UserError, number_of

Prompt = str | Sequence[dict[str, Any]]
_FORMS = 'an object with "prompt", with "messages" (or "conversations"), or with a question ("instruction", "question")'


def read_prompts(where: Where | Sources, *, on_error: OnError = "raise", note: Note = warn) -> list[Record]:
    """The records of files (see `read_rows`), each with a "prompt" and whatever other keys it has.

    A prompt is text, or messages that end with a user's or a tool's. If "messages" end with the assistant's, the prompt
    is everything before that message, and its text becomes "completion" unless the record has one; otherwise all
    messages are the prompt. A question and its answer (see `read_records`) become prompt and completion likewise.
    "tools" (a list) and "chat_template_kwargs" (an object) go to the chat template.

    Raises:
        UserError: see `read_rows`.
    """
    return list(iterate_prompts(where, on_error=on_error, note=note))


def iterate_prompts(where: Where | Sources, *, on_error: OnError = "raise", note: Note = warn) -> Iterator[Record]:
    """The records of `read_prompts`, one after another; see `iterate_rows`."""
    return iterate_rows(where, _accept, _FORMS, on_error=on_error, note=note, rest="for the rewards")


def encode_prompts(
    records: Iterable[Record],
    tokenizer: Any,
    max_prompt_length: int,
    *,
    overlong: str = "drop",
    on_error: OnError = "raise",
    note: Note = warn,
    writer: Writer | None = None,
    progress: Progress | None = None,
) -> tuple[Items, EncodeReport]:
    """An item for each prompt that is not too long, in order, and a report.

    Its one document is the prompt, no token of which is trained. The records, whose other columns rewards are given,
    are kept with the items, since they are asked for in any order as long as a run goes on. In them, the "completion"
    of an answer that calls tools is that turn as the template writes it.

    Args:
        records: they are read once.
        overlong: what happens to longer prompts: "drop" leaves them out, "error" raises.
        on_error, note: see `encode_all`.
        writer, progress: see `encode`.

    Raises:
        UserError: a prompt cannot be encoded, a prompt is too long and `overlong` is "error", or none remains; or the
            template cannot write an answer.
    """
    columns: set[str] = set()

    def one(record: Record) -> Encoding:
        columns.update(record)
        tokens = yield from _encode_prompt(record["prompt"], tokenizer, template_variables(record))
        if overlong == "error" and len(tokens) > max_prompt_length:
            raise UserError(f"found {len(tokens)} tokens, expected at most {max_prompt_length}")
        return record, tokens

    writer, places, dropped, counted = writer or Writer(), array.array("q"), 0, Counted(records)
    found = encode_all(counted, one, tokenizer, noun="prompt", on_error=on_error, note=note)
    for index, (record, tokens) in found:
        if progress:
            progress(index + 1)
        if len(tokens) > max_prompt_length:
            dropped += 1
            place = record.place if isinstance(record, Placed) else f"record {index + 1}"
            as_notes(note).leave_out(place, f"longer than {max_prompt_length} tokens: {len(tokens)}")
            continue
        document = Example(tokens, np.zeros(len(tokens), np.bool_))
        writer.add(Item((document,), record=_with_answer(record, tokenizer)))
        places.append(index)
    if not places:
        raise UserError(
            f"every prompt is longer than {number_of(max_prompt_length, 'token')} (found {dropped:,}); "
            "raise train.seq_len"
        )
    items = writer.finish()
    return items, EncodeReport(
        examples=len(items),
        tokens=len(items.examples.columns["tokens"]),
        trained_tokens=0,
        kept=places if writer.folder else tuple(places),
        cut=0,
        dropped=dropped,
        untrained=0,
        columns=tuple(sorted(columns - {"prompt"})),
        sources=counted.by_source(places),
    )


def _with_answer(record: Record, tokenizer: Any) -> Record:
    """The record; where the answer calls tools, "completion" is that turn as the template writes it.

    Raises:
        UserError: the template cannot write the answer.
    """
    last = (record.get("messages") or [{}])[-1]
    called = last.get("role") == "assistant" and last.get("tool_calls")
    if called and record.get("completion") == (last.get("content") or ""):
        return {**record, "completion": answer_text(record, tokenizer)}
    return record


def encode_prompt(prompt: Prompt, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> list[int]:
    """The tokens to generate from: a text's as it is, or those of messages with the template's opening of an answer.

    Args:
        variables: what else the chat template is given, see `template_variables`.

    Raises:
        UserError: the prompt is empty, it is messages and the tokenizer has no chat template, or the template refuses
            the messages or leaves out some of their words.
    """
    return encode_alone(_encode_prompt(prompt, tokenizer, variables), tokenizer).tolist()


def _encode_prompt(prompt: Prompt, tokenizer: Any, variables: Mapping[str, Any] | None) -> Encoding:
    if isinstance(prompt, str):
        text = plain_text(prompt, tokenizer)
    elif not tokenizer.chat_template:
        raise UserError("found a list of messages, but the tokenizer has no chat template: give a text")
    else:
        text = Text(write(prompt, tokenizer, variables, ask=True).text if prompt else "")
    [found] = yield [text]
    if not len(found.ids):
        raise UserError("found an empty prompt: there is nothing to continue")
    return found.ids


def _accept(row: Any) -> Accepted:
    """A record with a prompt. All its other keys go to the rewards, so none is reported as unused."""
    if not isinstance(row, dict):
        return Accepted([], [f"found {kind_of(row)}, expected {_FORMS}"])
    given, faults, unused = normal_row(row, ("prompt",), learned=False)
    if faults:
        return Accepted([], faults)
    try:
        row, field, faults = _with_prompt(given)
    except UserError as error:
        faults = [str(error)]
    if faults:
        return Accepted([], faults)
    prompt = row["prompt"]
    if isinstance(prompt, list) and (not prompt or prompt[-1]["role"] not in ("user", "tool")):
        found = f"a message of the {prompt[-1]['role']} at the end" if prompt else "none"
        expected = "a message of the user at the end, or a tool's: answers are started here, not continued"
        return Accepted([], [f"{field}: found {found}, expected {expected}"])
    if not prompt:
        return Accepted([], ["prompt: found empty text, expected something to continue"])
    if "messages" in row:
        unused += unused_keys(given, ("messages",), ("prompt",))
    row, faults, idle = with_system(row, "prompt")
    if isinstance(prompt, str):
        # The system text is then a column like others, which the rewards are given.
        idle += [f"{fault.partition(':')[0]}: not used: the prompt is plain text without it" for fault in faults]
        idle += unused_template_fields(row)
        faults = []
    media, shown = media_faults(row)
    return Accepted([row], faults, unused + idle + media + shown, _form(given))


def _form(row: Record) -> Form:
    if "messages" in row:
        return chat_form(row, ("messages",))
    keys = ("prompt",) if "prompt" in row else tuple(question_keys(row))
    return Form("prompts", (*keys, *(key for key in ("completion",) if key in row)))


def _with_prompt(row: Record) -> tuple[Record, str, list[str]]:
    """(the row with a prompt, and a completion if it has one; what the prompt is made of; its faults)."""
    if "messages" in row:
        faults = message_faults("messages", row["messages"])
        if faults or row["messages"][-1]["role"] != "assistant":
            return {**row, "prompt": row["messages"]}, "messages", faults
        prompt, completion = split_prompt(row)
        return {"completion": completion, **row, "prompt": prompt}, "messages before the last assistant message", []
    if "prompt" in row:
        return row, "prompt", side_faults("prompt", row["prompt"])
    if not asks(row):
        raise UserError(f"found the fields {sorted(row)} without prompt, expected {_FORMS}")
    words = answer(row)
    return ({} if words is None else {"completion": words}) | row | {"prompt": question(row)}, "the question", []
