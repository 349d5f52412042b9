"""Preference records: TRL's dataset formats in, two normal forms out. No tokens yet."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jlora.data.forms import (
    SIDES,
    TEMPLATE_FIELDS,
    answer,
    asks,
    media_faults,
    normal_row,
    question,
    question_keys,
    questions,
    unused_keys,
    with_system,
)
from jlora.data.found import CHATS, Form
from jlora.data.messages import completion_faults, kind_of, message_faults, side_faults
from jlora.data.notes import Note, warn
from jlora.data.paths import Where
from jlora.data.records import Accepted, OnError, Placed, Record, iterate_rows, source_of
from jlora.data.sources import Sources
from jlora.data.starts import extract_prompt, holds_question, shared_text_faults, with_question, without_prompt
from jlora.data.template import as_messages
from jlora.errors import UserError, number_of

Kind = Literal["pairs", "unpaired"]

NUMBERS = ("margin", "ref_chosen_logps", "ref_rejected_logps")
_OPTIONAL = ("prompt", *NUMBERS)
_JUDGED = ("chosen", "rejected", "completion", "completions", "scores", "ranks", "label", "kto_tag", *NUMBERS)
_PAIRS = (
    '"prompt", "chosen" and "rejected" ("prompt" may be their shared start, or be called "question", "instruction" or '
    '"conversations"), or "prompt", "completions" and "scores"'
)
_FORMS = {
    "pairs": f"an object with {_PAIRS}",
    "unpaired": 'an object with "prompt", "completion" and "label", or with "prompt", "chosen" and "rejected"',
}
# Unpairing puts the rejected answers of this many records after their chosen ones, as TRL does (the batch size of
# `datasets.map`): neighbours then rarely share a prompt, which KTO's mismatched pairs rely on.
_UNPAIRING_BLOCK = 1000


def read_preferences(
    where: Where | Sources, kind: Kind, *, on_error: OnError = "raise", note: Note = warn
) -> list[Record]:
    """The preference records of files (see `read_rows`) in one of two normal forms.

    "pairs"     {"prompt", "chosen", "rejected"}   each text, or each a list of messages
    "unpaired"  {"prompt", "completion", "label"}  likewise; label: True for a wanted answer

    If a pair has no prompt, the shared start of its answers is the prompt. Rankings (`{"prompt", "completions",
    "scores"}`, or "ranks", 1 being the best) become a pair for every two answers with different scores, whose "margin"
    is the difference. As "unpaired", a pair becomes two records. All other keys are kept; "margin", "ref_chosen_logps"
    and "ref_rejected_logps" are numbers, "tools" is a list, "chat_template_kwargs" an object.

    A prompt under another name ("question", "instruction" with its "input", "conversations" or "messages" that end with
    the user's) becomes messages, and a "system" beside it becomes the first of them.

    Raises:
        UserError: see `read_rows`.
    """
    return list(iterate_preferences(where, kind, on_error=on_error, note=note))


def iterate_preferences(
    where: Where | Sources, kind: Kind, *, on_error: OnError = "raise", note: Note = warn
) -> Iterator[Record]:
    """The records of `read_preferences`, one after another; see `iterate_rows`."""
    first: set[str] | None = None

    def accept(row: Any) -> Accepted:
        nonlocal first
        found = _normal(row, kind)
        for record in found.records if kind == "pairs" else ():
            numbers = set(NUMBERS) & set(record)
            first = numbers if first is None else first
            if numbers != first:
                here, there = (", ".join(sorted(names)) or "none" for names in (numbers, first))
                return Accepted([], [f"found the numbers {here}, expected {there}, as in the first record"])
        return found

    records = iterate_rows(where, accept, _FORMS[kind], on_error=on_error, note=note)
    return records if kind == "pairs" else _unpair(records)


def _normal(row: Any, kind: Kind) -> Accepted:
    """The records of one row (pairs, or unpaired ones), and its faults."""
    if not isinstance(row, dict):
        return Accepted([], [f"found {kind_of(row)}, expected {_FORMS[kind]}"])
    given = row
    row, faults, unused = normal_row(row, (*SIDES, "completions"), chat="prompt" not in row)
    row, number_faults = _options(row)
    if faults:
        return Accepted([], faults + number_faults)
    try:
        row, read = _with_prompt(row, kind)
        records, faults = _records(row, kind)
    except UserError as error:
        faults = [str(error)]
    media, shown = media_faults(row)
    if faults := number_faults + faults + media:
        return Accepted([], faults)
    found = [with_system(record, "prompt") for record in records]
    faults = list(dict.fromkeys(fault for _, wrong, _ in found for fault in wrong))
    records, idle = [record for record, _, _ in found], found[0][2]
    answers = "chosen and rejected" if "chosen" in records[0] else "completion"
    beside = unused_keys(
        records[0] | {"messages": row.get("messages")}, (*read, *SIDES, "completions", "scores"), answers=answers
    )
    return Accepted([] if faults else records, faults, unused + idle + shown + beside, _form(given, read))


def _form(row: Record, read: Sequence[str]) -> Form:
    """The form of a row, of which these keys were read."""
    if {"chosen", "rejected"} & set(row):
        name = "pairs"
    else:
        name = "rankings" if "completions" in row else "judged answers"
    keys = [key for key in read if key in row and key != "history"]
    keys += [key for key in CHATS if key in row and "messages" in read and key not in keys]
    keys += question_keys(row) if "history" in read else []
    return Form(name, tuple(dict.fromkeys((*keys, *(key for key in _JUDGED if key in row)))))


def _records(row: Record, kind: Kind) -> tuple[list[Record], list[str]]:
    """The records of a row whose prompt, if it has one, is under "prompt"; and its faults."""
    if {"chosen", "rejected"} & set(row):
        form, fields = _pair, ("chosen", "rejected")
    elif "completions" in row:
        form, fields = _rankings, ("prompt", "completions")
        if kind == "unpaired":
            return [], [f"found rankings (completions), expected {_FORMS[kind]}"]
    elif kind == "unpaired":
        form, fields = _unpaired, ("prompt", "completion", "label")
    else:
        form, fields = _pair, ("chosen", "rejected")
        if {"completion", "label"} <= set(row):
            return [], [f'found unpaired data, which algorithm="kto" learns from; expected {_FORMS[kind]}']
    if missing := [field for field in fields if field not in row]:
        return [], [f"found the fields {sorted(row)} without {' and '.join(missing)}, expected {_FORMS[kind]}"]
    records, faults = form(row)
    if any(isinstance(record["prompt"], str) for record in records):
        faults += [
            f"{name}: found it beside plain text, expected messages, since it is for the chat template"
            for name in TEMPLATE_FIELDS
            if row.get(name)
        ]
    return records, faults


def _with_prompt(row: Record, kind: Kind) -> tuple[Record, tuple[str, ...]]:
    """(the row with its prompt under "prompt", the keys that were read for it).

    Raises:
        UserError: what is under another name is not a prompt.
    """
    if "kto_tag" in row and "label" not in row:
        row = {**row, "label": row["kto_tag"]}
    if "prompt" in row or _asks_itself(row):
        return row, ("prompt", "label", "kto_tag")
    if "messages" in row:
        if faults := message_faults("messages", row["messages"]):
            raise UserError("; ".join(faults))
        return _from_messages(row, kind), ("prompt", "messages", "label", "kto_tag")
    if asks(row):
        words = {} if "completion" in row or kind == "pairs" or answer(row) is None else {"completion": answer(row)}
        return row | words | {"prompt": question(row)}, ("prompt", "history", "label", "kto_tag")
    return row, ("prompt", "label", "kto_tag")


def _asks_itself(row: Record) -> bool:
    """Whether chosen and rejected begin with the question, which the row also has under another name."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        return False
    if isinstance(chosen, list) and (side_faults("chosen", chosen) or side_faults("rejected", rejected)):
        return True  # `_pair` reports the faults
    return holds_question(extract_prompt(chosen, rejected)[0], questions(row))


def _from_messages(row: Record, kind: Kind) -> Record:
    """The row with its messages as the prompt, without the answer if they end with it."""
    messages = row["messages"]
    if messages[-1]["role"] != "assistant":
        return {**row, "prompt": messages}
    chosen = row.get("chosen")
    if kind == "unpaired" and "label" in row and "completion" not in row:
        return {**row, "prompt": messages[:-1], "completion": messages[-1:]}
    if messages[-1:] == (as_messages(chosen, "assistant") if isinstance(chosen, str) else chosen):
        return {**row, "prompt": messages[:-1]}
    raise UserError("messages: found an assistant message at the end, expected what chosen and rejected answer")


def _pair(row: Record) -> tuple[list[Record], list[str]]:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    faults = side_faults("chosen", chosen) + side_faults("rejected", rejected)
    if "prompt" in row:
        faults += side_faults("prompt", prompt)
    if not faults and type(chosen) is not type(rejected):
        faults = [f"found {kind_of(chosen)} as chosen and {kind_of(rejected)} as rejected, expected both alike"]
    if not faults and chosen == rejected:
        faults = ["found chosen and rejected equal, expected two different answers"]
    faults = faults or [f"{n}: found empty text, expected an answer" for n in ("chosen", "rejected") if not row[n]]
    if faults:
        return [], faults
    if "prompt" not in row:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
        if isinstance(prompt, str) and (faults := shared_text_faults(prompt, row, SIDES)):
            return [], faults
        if prompt == []:
            return [], ['found no message that chosen and rejected share, expected them to begin alike, or a "prompt"']
    elif isinstance(prompt, str) and isinstance(chosen, list):
        # Some data sets repeat the question at the start of both answers.
        prompt, chosen, rejected = with_question(as_messages(prompt, "user"), chosen, rejected)
    else:
        if isinstance(prompt, list):
            chosen, rejected = as_messages(chosen, "assistant"), as_messages(rejected, "assistant")
        prompt, chosen, rejected = without_prompt(prompt, chosen, rejected)
    faults = completion_faults("chosen", chosen) + completion_faults("rejected", rejected)
    return [{**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}], faults


def _rankings(row: Record) -> tuple[list[Record], list[str]]:
    """A pair for every two answers with different scores; and the row's faults."""
    completions, sign = row["completions"], 1.0 if "scores" in row else -1.0
    name = "scores" if "scores" in row else "ranks"
    scores = row.get(name)
    if not isinstance(completions, list) or not isinstance(scores, list):
        found = f"{kind_of(completions)} as completions and {kind_of(scores)} as {name}"
        return [], [f"found {found}, expected a list of answers and a list of as many scores"]
    faults = [fault for i, score in enumerate(scores) for fault in _number_faults(f"{name}[{i}]", score)]
    faults += [fault for i, text in enumerate(completions) for fault in completion_faults(f"completions[{i}]", text)]
    faults += side_faults("prompt", row["prompt"])
    faults += [
        f"{number}: found it beside completions, expected it with pairs only" for number in NUMBERS if number in row
    ]
    if len(scores) != len(completions):
        faults.append(
            f"found {number_of(len(completions), 'completion')} and {number_of(len(scores), name[:-1])}, expected as "
            "many of each"
        )
    elif not faults and len(set(scores)) < 2:
        faults.append(f"{name}: found {number_of(len(set(scores)), 'different value')}, expected at least 2")
    if faults:
        return [], faults
    kept = {key: value for key, value in row.items() if key not in ("completions", "scores", "ranks")}
    if any(isinstance(completion, list) for completion in completions):
        kept["prompt"] = as_messages(row["prompt"], "user")
    records = []
    for i, better in enumerate(scores):
        for j, worse in enumerate(scores):
            if (margin := sign * (better - worse)) > 0:
                found, pair_faults = _pair({**kept, "chosen": completions[i], "rejected": completions[j]})
                records += [{**record, "margin": float(margin)} for record in found]
                faults += [f"completions[{i}] over completions[{j}]: {fault}" for fault in pair_faults]
    return records, faults


def _unpaired(row: Record) -> tuple[list[Record], list[str]]:
    prompt, completion, label = row["prompt"], row["completion"], row["label"]
    faults = side_faults("prompt", prompt) + completion_faults("completion", completion)
    if not isinstance(label, bool):
        faults.append(f"label: found {kind_of(label)}, expected true or false")
    if faults:
        return [], faults
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt, completion = as_messages(prompt, "user"), as_messages(completion, "assistant")
    return [{**row, "prompt": prompt, "completion": completion}], []


def _options(row: Record) -> tuple[Record, list[str]]:
    """The row without optional fields that are null, and the faults of its numbers."""
    row, faults = {key: value for key, value in row.items() if value is not None or key not in _OPTIONAL}, []
    for name in NUMBERS:
        faults += _number_faults(name, row[name]) if name in row else []
    if len({"ref_chosen_logps", "ref_rejected_logps"} & set(row)) == 1:
        faults.append("found one of ref_chosen_logps and ref_rejected_logps, expected both or none")
    return row, faults


def _number_faults(field: str, value: Any) -> list[str]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return [f"{field}: found {kind_of(value)}, expected a number"]
    # The comparison is also false for NaN. A batch holds float32.
    return (
        [] if abs(value) <= float(np.finfo(np.float32).max) else [f"{field}: found {value}, expected a finite number"]
    )


def _unpair(records: Iterable[Record]) -> Iterator[Record]:
    """Every pair as two records: in each block of a source the chosen answers first, then the rejected ones."""
    for _, own in itertools.groupby(records, key=source_of):
        while block := list(itertools.islice(own, _UNPAIRING_BLOCK)):
            yield from (_half(record, "chosen") if "chosen" in record else record for record in block)
            yield from (_half(record, "rejected") for record in block if "chosen" in record)


def _half(record: Record, side: str) -> Record:
    kept = {key: value for key, value in record.items() if key not in ("chosen", "rejected")}
    return Placed(kept | {"completion": record[side], "label": side == "chosen"}, record.place, record.source)
