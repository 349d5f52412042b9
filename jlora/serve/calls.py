"""Calls of functions, which a model writes as text in the form of its chat template, told apart from other text.

Whatever is no call of a function that was given stays text, so that nothing is lost.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora.ends import WORDS
from jlora.serve.words import begun

Tool = Mapping[str, Any]


class Call(NamedTuple):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Form:
    """What stands around calls, which are JSON: objects with a name and arguments, or a name before its arguments."""

    opening: str
    closing: str = ""


_NAMES, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")
_KEYS = {*_NAMES, *_ARGUMENTS, "id", "tool_call_id", "type"}
# The fields of a response template that are used here.
FIELD, _TEXT = "tool_calls", "content"
# A text that may be calls without marks, as far as it goes.
_BARE = re.compile(r"\s*\[?\s*(\{.*)?", re.DOTALL)
# What comes before the JSON of a first call, and of one more. Mistral's newer templates write the name there.
_FIRST = re.compile(r"\s*(?:(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{))?(?=[{\[])")
BEHIND_NAME = ("[CALL_ID]", "[ARGS]")
_MORE = re.compile(r"\s*[;,]?\s*(?=\{)")
# A beginning of `_FIRST`.
_BEGUN = re.compile(r"\s*[\w.-]*(?:\[[\w\]\[]*)?\s*")
# What transformers raises for what is no call after all.
_UNREADABLE = (ValueError, LookupError, TypeError, RecursionError)


def _refuse(constant: str) -> None:
    """Raises ValueError: only Python's JSON has NaN and Infinity."""
    raise ValueError(f"found {constant}, expected a number that JSON has")


DECODER = json.JSONDecoder(parse_constant=_refuse)


class Reader:
    """The text and the calls of an answer that arrives in pieces. Space around calls is no part of the text.

    Args:
        names: of the functions that may be called.
        hidden: special tokens that are no part of the text.
    """

    def __init__(self, inner: "Marked | Templated", names: Collection[str], hidden: Sequence[str] = ()) -> None:
        self._inner, self._names, self._hidden = inner, names, hidden
        self._start: str | None = ""  # all of the answer, as long as it may be calls without marks
        self._space, self._has_text, self._has_calls = "", False, False

    def add(self, text: str) -> list[str | Call]:
        """What this piece lets be told."""
        return self._told(self._items(text, last=False))

    def end(self) -> list[str | Call]:
        """What had been kept back."""
        items = self._told(self._items("", last=True))
        return items if self._has_calls or not self._space else [*items, self._space]

    def _items(self, new: str, *, last: bool) -> Sequence[str | Call]:
        if self._start is None:
            return self._inner.read(new, last=last)
        self._start += new
        may_be = _BARE.fullmatch(self._start) is not None
        if may_be and not last:
            return ()
        text, self._start = self._start, None
        calls, end = _calls_at(text, 0, "", self._names, last=True) if may_be else ([], 0)
        return calls if calls and not text[end:].strip() else self._inner.read(text, last=last)

    def _told(self, items: Iterable[str | Call]) -> list[str | Call]:
        told: list[str | Call] = []
        for item in _joined(items):
            if isinstance(item, Call):
                self._has_calls = True
                told.append(item)
                continue
            for text in self._hidden:
                item = item.replace(text, "")
            text = self._space + item
            if self._has_calls and not self._has_text:
                text = text.lstrip()
            said = text.rstrip()
            self._space = text[len(said) :]
            if said:
                self._has_text = True
                told.append(said)
        return told


class Marked:
    """Calls in the marks of some forms. Each piece gives, in order, all that is certain by then."""

    def __init__(self, forms: Sequence[Form], names: Collection[str]) -> None:
        self._forms, self._names, self._held = forms, names, ""

    def read(self, new: str, *, last: bool) -> list[str | Call]:
        self._held += new
        items: list[str | Call] = []
        while found := self._next():
            place, form = found
            items.append(self._held[:place])
            self._held = self._held[place:]
            calls, end = _calls_at(self._held, len(form.opening), form.closing, self._names, last=last)
            if end is None:
                return items
            items += calls or [self._held[:end]]
            self._held = self._held[end:]
        kept = 0 if last else max(begun(self._held, form.opening) for form in self._forms)
        items.append(self._held[: len(self._held) - kept])
        self._held = self._held[len(self._held) - kept :]
        return items

    def _next(self) -> tuple[int, Form] | None:
        """The first opening, and where it is."""
        places = [(self._held.find(form.opening), form) for form in self._forms]
        return min((pair for pair in places if pair[0] >= 0), key=lambda pair: pair[0], default=None)


class Templated:
    """Calls as the tokenizer's response template describes them, which transformers parses.

    Its other fields, such as reasoning, are text here as they are without tools.

    Args:
        field: how the template describes calls.
    """

    def __init__(self, tokenizer: Any, field: Mapping[str, Any], tools: Sequence[Tool], names: Collection[str]) -> None:
        spec = {"start_anchor": WORDS, "fields": {FIELD: dict(field), _TEXT: {"content": "text"}}}
        self._start = lambda: tokenizer.get_response_parser(spec, prefix="", tools=[*tools])
        self._parser, self._names = self._start(), names
        self._is_json = field.get("content") == "json"
        self._tags, self._body = _tags(field), ""
        # The text that no event has told of. A literal mark ends a call at once, a pattern one character later.
        self._untold, self._ahead = "", 1 if "close_pattern" in field else 0

    def read(self, new: str, *, last: bool) -> list[str | Call]:
        items: list[str | Call] = []
        for character in new:  # one by one, so that it is known where a call ends
            self._untold += character
            items += self._heard(lambda parser, one=character: parser.feed(one), self._ahead)
        if last:
            # What is no JSON can be read although it is cut short, and is no call then.
            if self._is_json or self._is_closed():
                items += self._heard(lambda parser: parser.finalize()[1], 0)
            items.append(self._untold)
        return items

    def _is_closed(self) -> bool:
        """Whether the last call has its closing mark, which a pattern may find only by what comes next."""
        try:
            events = self._start().feed(self._untold + "\0")
        except _UNREADABLE:
            return False
        return any(event["type"] == "region_close" and event["field"] == FIELD for event in events)

    def _heard(self, turn: Callable[[Any], list[dict[str, Any]]], ahead: int) -> list[str | Call]:
        try:
            events = turn(self._parser)
        except _UNREADABLE:
            text, rest = self._cut(ahead)
            self._parser, self._untold, self._body = self._start(), "", ""
            return [text, *self.read(rest, last=False)]
        items: list[str | Call] = []
        for event in events:
            if event["field"] == _TEXT and event["type"] == "region_chunk":
                items.append(event["text"])
                self._untold = self._untold[len(event["text"]) :]
            elif event["type"] == "region_chunk":
                self._body += event["text"]
            elif event["field"] == FIELD and event["type"] == "region_close":
                text, self._untold = self._cut(ahead)
                items += (self._is_read() and calls_in(event["value"], self._names)) or [text]
                self._body = ""
        return items

    def _is_read(self) -> bool:
        """Whether all of a call in tags is read: transformers leaves out arguments whose tags are not complete."""
        return self._tags is None or "<" not in re.sub(r"</[^<>]*>", "", self._tags.sub("", self._body))

    def _cut(self, ahead: int) -> tuple[str, str]:
        place = len(self._untold) - ahead
        return self._untold[:place], self._untold[place:]


def _tags(field: Mapping[str, Any]) -> re.Pattern[str] | None:
    """The pattern of an argument in tags, if a response template's field has one that Python reads as well."""
    pattern = (field.get("content_args") or {}).get("tag_pattern")
    try:
        return None if pattern is None else re.compile(pattern, re.DOTALL)
    except re.error:
        return None


def _joined(items: Iterable[str | Call]) -> list[str | Call]:
    """The items, with texts that follow each other as one."""
    joined: list[str | Call] = []
    for item in items:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        elif item:
            joined.append(item)
    return joined


def _calls_at(
    text: str, start: int, closing: str, names: Collection[str], *, last: bool
) -> tuple[list[Call], int | None]:
    """The calls at a place of the text, and where they end.

    There may be none, and the end is None if more has to come before that is certain.
    """
    calls, end = [], start
    while head := (_MORE if calls else _FIRST).match(text, end):
        try:
            value, end = DECODER.raw_decode(text, head.end())
        except (ValueError, RecursionError) as error:
            return [], None if not last and _may_go_on(error, closing) else start
        name = head.groupdict().get("name")
        found = calls_in(value if name is None else {"name": name, "arguments": value}, names)
        if not found:
            return [], start
        calls += found
    if not calls:
        return [], None if _BEGUN.fullmatch(text, start) and not last else start
    rest = text[end:].lstrip()
    if closing and rest.startswith(closing):
        return calls, len(text) - len(rest) + len(closing)
    return calls, None if not last and (closing.startswith(rest) or rest in (";", ",")) else end


def _may_go_on(error: Exception, closing: str) -> bool:
    """Whether what could not be read as JSON may be the beginning of a call, and not a call with a mistake in it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    # The closing mark may be a part of a text that has not ended.
    return not closing or closing not in error.doc[error.pos :] or error.msg.startswith("Unterminated string")


def calls_in(value: Any, names: Collection[str]) -> list[Call]:
    """The calls that a JSON value is; none if any of it is something else, or calls a function that was not given."""
    found = [_call(item, names) for item in (value if isinstance(value, list) else [value])]
    return [] if None in found else found


def _call(value: Any, names: Collection[str]) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"] if {*value} - _KEYS == {"function"} else None
    if not isinstance(value, dict) or {*value} - _KEYS:
        return None
    name = next((value[key] for key in _NAMES if key in value), None)
    arguments = next((value[key] for key in _ARGUMENTS if key in value), None)
    try:
        arguments = DECODER.decode(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return None
