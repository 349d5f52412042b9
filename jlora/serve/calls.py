"""Calls of functions, which a model writes as text in the form of its chat template, told apart from other text.

Whatever is no call of a function that was given stays text, so that nothing is lost.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jlora.data.rendered import write
from jlora.ends import WORDS
from jlora.errors import UserError
from jlora.serve.words import begun

Tool = Mapping[str, Any]


def _refuse(constant: str) -> None:
    """Raises ValueError: only Python's JSON has NaN and Infinity."""
    raise ValueError(f"found {constant}, expected a number that JSON has")


class Call(NamedTuple):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Form:
    """What stands around calls, which are JSON: objects with a name and arguments, or a name before its arguments."""

    opening: str
    closing: str = ""


# For templates that show no marks of their own. Calls without marks are known anyway, if they are all of the answer.
FORMS = (
    Form("<tool_call>", "</tool_call>"),  # Hermes, Qwen
    Form("[TOOL_CALLS]"),  # Mistral
    Form("<|python_tag|>"),  # Llama 3.1
)
_NAMES, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")
_KEYS = {*_NAMES, *_ARGUMENTS, "id", "tool_call_id", "type"}
# A call whose rendering shows the template's form.
_PROBE, _KEY, _VALUE = "jlora_probe", "text", "jlora_value"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "A text."}}},
    },
}
_PROBE_CALL = {"id": "123456789", "type": "function", "function": {"name": _PROBE, "arguments": {_KEY: _VALUE}}}
# The fields of a response template that are used here.
_FIELD, _TEXT = "tool_calls", "content"
# A text that may be calls without marks, as far as it goes.
_BARE = re.compile(r"\s*\[?\s*(\{.*)?", re.DOTALL)
# What comes before the JSON of a first call, and of one more. Mistral's newer templates write the name there.
_FIRST = re.compile(r"\s*(?:(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{))?(?=[{\[])")
_BEHIND_NAME = ("[CALL_ID]", "[ARGS]")
_MORE = re.compile(r"\s*[;,]?\s*(?=\{)")
# A beginning of `_FIRST`.
_BEGUN = re.compile(r"\s*[\w.-]*(?:\[[\w\]\[]*)?\s*")
_DECODER = json.JSONDecoder(parse_constant=_refuse)


class CallForms:
    """How a model with this tokenizer writes calls.

    The tokenizer's own response template is used if it has one; else what its chat template writes around a call; else
    `FORMS`.

    Attributes:
        kept: the special tokens that mark calls, without which they could not be told from text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._field = ((getattr(tokenizer, "response_template", None) or {}).get("fields") or {}).get(_FIELD)
        self._forms = FORMS if self._field else _learned(tokenizer) or FORMS
        if self._field:
            marks = json.dumps(self._field, ensure_ascii=False).replace("\\", "")  # patterns escape what is in marks
        else:
            marks = "\n".join([*(mark for form in self._forms for mark in dataclasses.astuple(form)), *_BEHIND_NAME])
        special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.kept = tuple(token for token, text in special.items() if text in marks)
        self._hidden = [special[token] for token in self.kept]

    def reader(self, tools: Sequence[Tool]) -> "Reader":
        """What takes an answer apart to a request with these tools."""
        functions = [tool.get("function", tool) for tool in tools]
        named = [function.get("name") for function in functions if isinstance(function, Mapping)]
        names = {name for name in named if isinstance(name, str)}
        inner = _Templated(self._tokenizer, self._field, tools, names) if self._field else _Marked(self._forms, names)
        return Reader(inner, names, self._hidden)


class Reader:
    """The text and the calls of an answer that arrives in pieces. Space around calls is no part of the text.

    Args:
        names: of the functions that may be called.
        hidden: special tokens that are no part of the text.
    """

    def __init__(self, inner: "_Marked | _Templated", names: Collection[str], hidden: Sequence[str] = ()) -> None:
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


class _Marked:
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


class _Templated:
    """Calls as the tokenizer's response template describes them, which transformers parses.

    Its other fields, such as reasoning, are text here as they are without tools.

    Args:
        field: how the template describes calls.
    """

    def __init__(self, tokenizer: Any, field: Mapping[str, Any], tools: Sequence[Tool], names: Collection[str]) -> None:
        spec = {"start_anchor": WORDS, "fields": {_FIELD: dict(field), _TEXT: {"content": "text"}}}
        self._start = lambda: tokenizer.get_response_parser(spec, prefix="", tools=[*tools])
        self._parser, self._names = self._start(), names
        # The text that no event has told of. A literal mark ends a call at once, a pattern one character later.
        self._untold, self._ahead = "", 1 if "close_pattern" in field else 0

    def read(self, new: str, *, last: bool) -> list[str | Call]:
        items: list[str | Call] = []
        for character in new:  # one by one, so that it is known where a call ends
            self._untold += character
            items += self._heard(lambda parser, one=character: parser.feed(one), self._ahead)
        if last:
            items += self._heard(lambda parser: parser.finalize()[1], 0)
            items.append(self._untold)
        return items

    def _heard(self, turn: Callable[[Any], list[dict[str, Any]]], ahead: int) -> list[str | Call]:
        try:
            events = turn(self._parser)
        except (ValueError, LookupError, TypeError, RecursionError):  # of what is no call after all
            text, rest = self._cut(ahead)
            self._parser, self._untold = self._start(), ""
            return [text, *self.read(rest, last=False)]
        items: list[str | Call] = []
        for event in events:
            if event["field"] == _TEXT and event["type"] == "region_chunk":
                items.append(event["text"])
                self._untold = self._untold[len(event["text"]) :]
            elif event["field"] == _FIELD and event["type"] == "region_close":
                text, self._untold = self._cut(ahead)
                items += _calls(event["value"], self._names) or [text]
        return items

    def _cut(self, ahead: int) -> tuple[str, str]:
        place = len(self._untold) - ahead
        return self._untold[:place], self._untold[place:]


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
            value, end = _DECODER.raw_decode(text, head.end())
        except (ValueError, RecursionError) as error:
            return [], None if not last and _may_go_on(error, closing) else start
        name = head.groupdict().get("name")
        found = _calls(value if name is None else {"name": name, "arguments": value}, names)
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


def _calls(value: Any, names: Collection[str]) -> list[Call]:
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
        arguments = _DECODER.decode(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, RecursionError):
        return None


def _learned(tokenizer: Any) -> tuple[Form, ...]:
    """The form in which the chat template writes a call; none if that is no JSON, or has no marks."""
    answers = ({"content": "", "tool_calls": [_PROBE_CALL]}, {"content": WORDS})
    try:
        called, said = (
            write(
                [{"role": "user", "content": "?"}, {"role": "assistant", **answer}], tokenizer, {"tools": [_PROBE_TOOL]}
            ).text
            for answer in answers
        )
    except UserError:
        return ()
    start, end = _place(called)
    header, _, ending = said.rpartition(WORDS)
    before, closing = called[:start], called[end:].rstrip().removesuffix(ending.rstrip()).strip()
    if before.startswith(header.rstrip()):
        opening = before.removeprefix(header.rstrip()).rpartition("</think>")[2].strip()
    else:  # the turn begins in another way than one without calls
        opening = "".join(before.split()[-1:])
    return (Form(opening, closing),) if opening else ()


def _place(text: str) -> tuple[int, int]:
    """Where the JSON of the probe's call begins and ends; two zeros if there is none."""
    expected, value = [Call(_PROBE, json.dumps({_KEY: _VALUE}))], text.rfind(_VALUE)
    for found in re.finditer(r"[{\[]", text[: max(0, value)]):
        try:
            parsed, end = _DECODER.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        if end > value and _calls(parsed, {_PROBE}) == expected:
            return found.start(), end
    return 0, 0
