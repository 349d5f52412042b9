"""Prompts for online learning: records to generate from, and their tokens."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.data.chat import split_prompt
from jlora.data.records import (
    Record,
    check_record,
    kind_of,
    read_rows,
    side_faults,
    with_template_fields,
)
from jlora.data.template import template_tokens, template_variables, text_tokens
from jlora.errors import UserError, describe_faults

Prompt = str | Sequence[dict[str, Any]]
_FORMS = 'an object with "prompt", or with "messages"'


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """What became of the prompts.

    Args:
      kept: index of the record of each prompt kept.
      dropped: how many were left out because they were too long.
    """

    kept: tuple[int, ...]
    dropped: int


def read_prompts(path: str | pathlib.Path) -> list[Record]:
    """The records of a file (see `read_rows`), each with a "prompt" and whatever other keys it has.

    A prompt is text, or messages of which the last is a user's. Where there are "messages", the prompt is everything
    before the last assistant message, whose text becomes "completion" unless the record has one. "tools" (a list) and
    "chat_template_kwargs" (an object) go to the chat template.

    Raises:
        FileNotFoundError, ValueError: see `read_rows`.
    """
    return read_rows(path, _accept, _FORMS)


def encode_prompts(
    records: Sequence[Record], tokenizer: Any, max_prompt_length: int, *, overlong: str = "drop"
) -> tuple[list[list[int]], PromptReport]:
    """The tokens of each prompt that is not too long, in order, and which records they belong to.

    Args:
        overlong: "drop", or "error".

    Raises:
        ValueError: a prompt cannot be encoded, is too long where `overlong` is "error", or none remains.
    """
    encoded, kept, faults = [], [], []
    for index, record in enumerate(records):
        try:
            tokens = encode_prompt(record["prompt"], tokenizer, template_variables(record))
        except UserError as error:
            faults.append(f"record {index + 1}: {error}")
            continue
        if len(tokens) <= max_prompt_length:
            encoded.append(tokens)
            kept.append(index)
        elif overlong == "error":
            faults.append(f"record {index + 1}: found {len(tokens)} tokens, expected at most {max_prompt_length}")
    if faults:
        raise UserError(describe_faults(f"{len(faults)} of {len(records)} prompts cannot be used", faults))
    if not encoded:
        raise UserError(f"all {len(records)} prompts are longer than {max_prompt_length} tokens; raise train.seq_len")
    return encoded, PromptReport(tuple(kept), len(records) - len(kept))


def encode_prompt(prompt: Prompt, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> list[int]:
    """The tokens to generate from: of a text as it is, of messages with the template's opening of an answer.

    Args:
        variables: the chat template's own, see `template_variables`.

    Raises:
        ValueError: there are no tokens, or messages for a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        tokens = text_tokens(prompt, tokenizer)
    elif not tokenizer.chat_template:
        raise UserError("found a list of messages, but the tokenizer has no chat template: give a text")
    else:
        tokens = template_tokens(list(prompt), tokenizer, add_generation_prompt=True, variables=variables)
    if not len(tokens):
        raise UserError("found an empty prompt: there is nothing to continue")
    return tokens.tolist()


def _accept(row: Any) -> tuple[list[Record], list[str]]:
    if not isinstance(row, dict):
        return [], [f"found {kind_of(row)}, expected {_FORMS}"]
    row, option_faults = with_template_fields(row)
    if option_faults:
        return [], option_faults
    if "messages" in row:
        if faults := check_record(row):
            return [], faults
        prompt, completion = split_prompt(row)
        row = {"completion": completion, **row, "prompt": prompt}
        field = "messages before the last assistant message"
    else:
        if "prompt" not in row:
            return [], [f"found the fields {sorted(row)} without prompt, expected {_FORMS}"]
        prompt, field = row["prompt"], "prompt"
        if faults := side_faults("prompt", prompt):
            return [], faults
    if isinstance(prompt, list) and (not prompt or prompt[-1]["role"] != "user"):
        found = f"a message of the {prompt[-1]['role']} at the end" if prompt else "none"
        return [], [f"{field}: found {found}, expected a message of the user at the end"]
    return [row], [] if prompt else ["prompt: found empty text, expected something to continue"]
