"""Prompts for online learning: records to generate from, and their tokens."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.data.chat import answer_text, encode_all, split_prompt
from jlora.data.forms import (
    answer,
    asks,
    media_faults,
    normal_row,
    question,
    unused_keys,
    unused_template_fields,
    with_system,
)
from jlora.data.messages import kind_of, message_faults, side_faults
from jlora.data.records import Accepted, Note, OnError, Record, read_rows, warn
from jlora.data.rendered import write
from jlora.data.template import template_variables
from jlora.data.tokens import Encoding, Text, encode_alone, plain_text
from jlora.errors import UserError

Prompt = str | Sequence[dict[str, Any]]
_FORMS = 'an object with "prompt", with "messages" (or "conversations"), or with a question ("instruction", "question")'


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """What became of the prompts.

    Attributes:
        kept: index of the record of each kept prompt.
        dropped: how many prompts were left out because they are too long.
    """

    kept: tuple[int, ...]
    dropped: int


def read_prompts(path: str | pathlib.Path, *, on_error: OnError = "raise", note: Note = warn) -> list[Record]:
    """The records of a file (see `read_rows`), each with a "prompt" and whatever other keys it has.

    A prompt is text, or messages that end with a user's or a tool's. If "messages" end with the assistant's, the prompt
    is everything before that message, and its text becomes "completion" unless the record has one; otherwise all
    messages are the prompt. A question and its answer (see `read_records`) become prompt and completion likewise.
    "tools" (a list) and "chat_template_kwargs" (an object) go to the chat template.

    Raises:
        UserError: see `read_rows`.
    """
    return read_rows(path, _accept, _FORMS, on_error=on_error, note=note)


def encode_prompts(
    records: Sequence[Record],
    tokenizer: Any,
    max_prompt_length: int,
    *,
    overlong: str = "drop",
    on_error: OnError = "raise",
    note: Note = warn,
) -> tuple[list[list[int]], PromptReport]:
    """The tokens of each prompt that is not too long, in order, and a report of which records they belong to.

    Args:
        overlong: what happens to longer prompts: "drop" leaves them out, "error" raises.
        on_error, note: see `encode_all`.

    Raises:
        UserError: a prompt cannot be encoded, a prompt is too long and `overlong` is "error", or none remains.
    """

    def one(record: Record) -> Encoding:
        tokens = yield from _encode_prompt(record["prompt"], tokenizer, template_variables(record))
        if overlong == "error" and len(tokens) > max_prompt_length:
            raise UserError(f"found {len(tokens)} tokens, expected at most {max_prompt_length}")
        return tokens

    found = list(encode_all(records, one, tokenizer, noun="prompts", on_error=on_error, note=note))
    encoded = [(index, tokens) for index, tokens in found if len(tokens) <= max_prompt_length]
    if not encoded:
        raise UserError(f"all {len(records)} prompts are longer than {max_prompt_length} tokens; raise train.seq_len")
    kept = tuple(index for index, _ in encoded)
    return [tokens for _, tokens in encoded], PromptReport(kept, len(found) - len(kept))


def with_answers(records: Sequence[Record], tokenizer: Any) -> list[Record]:
    """The records of `read_prompts`; where an answer calls tools, "completion" is that turn as the template writes it.

    Raises:
        UserError: the template cannot write the answer.
    """
    found = []
    for record in records:
        messages = record.get("messages") or [{}]
        called = messages[-1].get("role") == "assistant" and messages[-1].get("tool_calls")
        if called and record.get("completion") == (messages[-1].get("content") or ""):
            record = {**record, "completion": answer_text(record, tokenizer)}
        found.append(record)
    return found


def encode_prompt(prompt: Prompt, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> list[int]:
    """The tokens to generate from: a text's as it is, or those of messages with the template's opening of an answer.

    Args:
        variables: what else the chat template is given, see `template_variables`.

    Raises:
        UserError: the prompt is empty, it is messages and the tokenizer has no chat template, or the template refuses
            the messages or leaves out some of their words.
    """
    return encode_alone(_encode_prompt(prompt, tokenizer, variables), tokenizer)


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
    return found.ids.tolist()


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
    return Accepted([row], faults, unused + idle + media + shown)


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
