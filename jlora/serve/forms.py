"""In what form a tokenizer's models write calls: tables, and a chat template's rendering of a probe, which decides."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.data.rendered import write
from jlora.ends import WORDS
from jlora.errors import UserError
from jlora.serve.calls import BEHIND_NAME, DECODER, FIELD, Call, Form, Marked, Reader, Templated, Tool, calls_in

# For templates that show no marks of their own. Calls without marks are known anyway, if they are all of the answer.
FORMS = (
    Form("<tool_call>", "</tool_call>"),  # Hermes, Qwen
    Form("[TOOL_CALLS]"),  # Mistral
    Form("<|python_tag|>"),  # Llama 3.1
)
# Calls that are no JSON, as fields of transformers' response templates: for chat templates whose calls they read.
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
FIELDS = (
    {  # Qwen 3 Coder and from 3.5 on, Nemotron 3
        "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
        "transform": _NAMED,
    },
    {  # GLM from 4.5 on
        "open_pattern": r"<tool_call>(?P<name>[\w.-]+)\s*",
        "close": "</tool_call>",
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"},
        "transform": _NAMED,
    },
    {  # Gemma 4
        "open_pattern": r"<\|tool_call>call:(?P<name>[\w.-]+)",
        "close": "<tool_call|>",
        "content": "json",
        "content_args": {"string_delims": [['<|"|>', '<|"|>']], "unquoted_keys": True},
        "transform": _NAMED,
    },
    {  # gpt-oss
        "open_pattern": r"(?:<\|start\|>assistant)?(?:<\|channel\|>commentary)? ?to=functions\.(?P<name>[\w.-]+)"
        r"(?:<\|channel\|>commentary)? ?(?:<\|constrain\|>)?(?:json)?<\|message\|>",
        "close": "<|call|>",
        "content": "json",
        "transform": _NAMED,
    },
    {  # LFM 2.5
        "open": "<|tool_call_start|>",
        "close": "<|tool_call_end|>",
        "content": "python-call-list",
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        "transform_each": True,
    },
)
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
_EXPECTED = Call(_PROBE, json.dumps({_KEY: _VALUE}))


class CallForms:
    """How a model with this tokenizer writes calls.

    This is the first of these that there is: the tokenizer's own response template; the marks that its chat template
    writes around a call in JSON; what of `FIELDS` reads the call that the chat template writes; `FORMS`.

    Attributes:
        kept: the special tokens that mark calls, without which they could not be told from text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._forms = tokenizer, FORMS
        self._field = ((getattr(tokenizer, "response_template", None) or {}).get("fields") or {}).get(FIELD)
        if self._field is None and (shown := _probed(tokenizer)):
            self._forms = _learned(*shown) or FORMS
            if self._forms is FORMS:
                self._field = next((field for field in FIELDS if _reads(field, shown[0], tokenizer)), None)
        if self._field:
            marks = json.dumps(self._field, ensure_ascii=False).replace("\\", "")  # patterns escape what is in marks
        else:
            marks = "\n".join([*(mark for form in self._forms for mark in dataclasses.astuple(form)), *BEHIND_NAME])
        special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.kept = tuple(token for token, text in special.items() if text in marks)
        self._hidden = [special[token] for token in self.kept]

    def reader(self, tools: Sequence[Tool]) -> "Reader":
        """What takes an answer apart to a request with these tools."""
        names = names_of(tools)
        inner = Templated(self._tokenizer, self._field, tools, names) if self._field else Marked(self._forms, names)
        return Reader(inner, names, self._hidden)


def names_of(tools: Sequence[Tool]) -> set[str]:
    """The names of the tools that have one."""
    functions = [tool.get("function", tool) for tool in tools]
    named = [function.get("name") for function in functions if isinstance(function, Mapping)]
    return {name for name in named if isinstance(name, str)}


def _probed(tokenizer: Any) -> tuple[str, str] | None:
    """A chat with a call, and one with `WORDS`, as the chat template writes them; None if it does not."""
    answers = ({"content": "", "tool_calls": [_PROBE_CALL]}, {"content": WORDS})
    chats = [[{"role": "user", "content": "?"}, {"role": "assistant", **answer}] for answer in answers]
    try:
        called, said = (write(chat, tokenizer, {"tools": [_PROBE_TOOL]}).text for chat in chats)
    except UserError:
        return None
    return called, said


def _learned(called: str, said: str) -> tuple[Form, ...]:
    """The form of the call in what is `_probed`; none if it is no JSON, or has no marks."""
    start, end = _place(called)
    header, _, ending = said.rpartition(WORDS)
    before, closing = called[:start], called[end:].rstrip().removesuffix(ending.rstrip()).strip()
    # The turn may begin in another way than one without calls, with another mark; then they share a part of these.
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, header.rstrip(), strict=False))
    shared = re.sub(r"[<\[][^>\]\s]*$", "", "".join(character for character, _ in same))
    opening = before.removeprefix(shared).strip()
    return (Form(opening, closing),) if opening else ()


def _reads(field: Mapping[str, Any], called: str, tokenizer: Any) -> bool:
    """Whether a field of a response template reads the probe's call."""
    try:
        return _EXPECTED in Templated(tokenizer, field, [_PROBE_TOOL], {_PROBE}).read(called, last=True)
    except ValueError:  # an older transformers does not know this kind of content
        return False


def _place(text: str) -> tuple[int, int]:
    """Where the JSON of the probe's call begins and ends; two zeros if there is none."""
    value = text.rfind(_VALUE)
    for found in re.finditer(r"[{\[]", text[: max(0, value)]):
        try:
            parsed, end = DECODER.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        if end > value and calls_in(parsed, {_PROBE}) == [_EXPECTED]:
            return found.start(), end
    return 0, 0
