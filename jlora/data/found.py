"""Which forms rows were found in, and which of their keys were not used: one line for those who read a log."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora.errors import first_few, number_of

SHOWN_KEYS = 8
CHATS = ("messages", "conversations", "conversation")
# Read beside any form, where a row has them.
BESIDE = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs")


class Form(NamedTuple):
    """The form of a row: its name, and the keys that were read."""

    name: str
    keys: tuple[str, ...]


def chat_form(row: Mapping[str, Any], keys: Sequence[str]) -> Form:
    """The form of a row whose chat is under one of these keys."""
    key = next(key for key in (*CHATS, *keys) if key in row)
    turns = row[key] if isinstance(row[key], list) else []
    said = any(isinstance(turn, dict) and "from" in turn for turn in turns)
    return Form("ShareGPT" if said else "chats", (key,))


def question_form(keys: Sequence[str]) -> Form:
    """The form of a row whose question and answer are under these keys."""
    return Form("Alpaca" if "instruction" in keys else "questions and answers", tuple(keys))


@dataclasses.dataclass
class Seen:
    """Counts the forms of the rows of a source.

    Attributes:
        rest: what becomes of keys that no form reads.
    """

    rest: str = "not used"
    forms: Counter = dataclasses.field(default_factory=Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    read: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)
    others: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, form: Form | None, row: Mapping[str, Any], place: str) -> None:
        """Adds a row."""
        if form is None:
            return
        self.forms[form.name] += 1
        self.first.setdefault(form.name, place)
        self.read.setdefault(form.name, {}).update(dict.fromkeys(form.keys))
        others = (key for key, value in row.items() if key not in (*form.keys, *BESIDE) and value not in (None, "", []))
        self.others.update(dict.fromkeys(others))

    def describe(self, name: str, count: int) -> str:
        """A sentence on the source of that name, of which `count` records are used."""
        shown = [
            f"{form} ({', '.join(self.read[form])})"
            if len(self.forms) == 1
            else f"{rows:,} {form} ({', '.join(self.read[form])}; first {self.first[form]})"
            for form, rows in self.forms.most_common()
        ]
        text = f"{name}: {number_of(count, 'record')}, read as {' and '.join(shown)}"
        if len(self.forms) > 1:
            text += "; data.form reads one form alone"
        return f"{text}; {self.rest}: {rest}" if (rest := self._rest()) else text

    def _rest(self) -> str:
        read = {key for keys in self.read.values() for key in keys}
        return first_few((key for key in self.others if key not in read), SHOWN_KEYS)


def shown_row(row: Mapping[str, Any]) -> str:
    """A row's keys with the beginnings of their values, for a message."""
    return ", ".join(f"{key}={_short(value)}" for key, value in _some(row.items()))


def _some(items: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return list(items)[:SHOWN_KEYS]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 30 else f"{text[:29]}…"
