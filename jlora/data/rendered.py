"""Chats as templates write them, with nothing lost: one function renders chats for every objective and every answer.

A chat is rendered twice, as it is and with marks on its texts (`jlora.data.marks`), which must be equal without the
marks. What lies between two marks shows whether a text is whole. If one is not, each word is marked, so that whatever
the template leaves out can be named. If marks change what it writes, the words are searched for.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jlora.data.marks import REASONING, Leaf, Marked, is_written, read_marks
from jlora.data.template import FOLD_HINT, render
from jlora.errors import UserError

Messages = list[dict[str, Any]]
SHOWN = 3
_PARTS = re.compile(r"""['"]type['"]: ['"]text['"]""")
BY_DESIGN = (
    "the chat template drops text that it writes while the chat ends there (reasoning of earlier turns, words beside a "
    "call, a system text), so this text is not learned"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """A chat as a template wrote it.

    Attributes:
        text: what it wrote.
        messages: as they were given to it: `arguments` in the form that it reads, no keys that only jlora reads.
        variables: what else the template was given.
        tokenizer: the tokenizer that has the template.
        marked: the chat with marks; None if marks change what the template writes.
        places: (number of a mark, its place in `text`) in order.
        remarks: notes on the chat.
    """

    text: str
    messages: Messages
    variables: Mapping[str, Any]
    tokenizer: Any
    marked: Marked | None
    places: tuple[tuple[int, int], ...]
    remarks: tuple[str, ...] = ()

    def again(self, messages: Messages, *, ask: bool = False, marks: bool = False) -> str:
        """Other messages as the template writes them; with `ask`, it asks for an answer at the end."""
        return render(
            messages,
            self.tokenizer,
            add_generation_prompt=ask,
            variables=_with_tools(self.variables, self.marked) if marks else self.variables,
        )


def write(
    messages: Sequence[Any],
    tokenizer: Any,
    variables: Mapping[str, Any] | None = None,
    *,
    trained: Sequence[int] = (),
    ask: bool = False,
    text: str | None = None,
) -> Written:
    """The chat as the tokenizer's template writes it.

    Templates differ in how they read a call: `arguments` are given as an object, as transformers documents, or as JSON
    text if the template cannot write that. Likewise a missing content is given as empty text, and reasoning under other
    names, if the template needs it.

    The template must write the words of every message, tools, calls and their arguments, and the reasoning of the
    messages in `trained`. What it writes only while a chat ends there (Qwen 3's reasoning of earlier turns, Mistral's
    system text) may be missing, as it is when the model answers.

    Args:
        variables: what else the template is given, such as tools.
        trained: indices of the messages that are trained.
        ask: whether the template asks for an answer at the end.
        text: the messages as the template writes them, if that is known and their form is the documented one.

    Raises:
        UserError: the messages are malformed, the template refuses them, or it leaves something out; the error says
            what.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'messages[{index}]: found {message!r:.60}, expected an object with "role" and "content"')
    variables, refused, lossy, spare = variables or {}, None, None, None
    for candidate in _spellings(messages):
        try:
            found, text = text, None
            if found is None:
                found = render(candidate, tokenizer, add_generation_prompt=ask, variables=variables)
        except UserError as error:
            refused = refused or error
            continue
        if any(isinstance(message.get("content"), list) for message in candidate) and _PARTS.search(found):
            continue  # the parts are written as Python or JSON: the template expects text
        written = _marked(found, candidate, tokenizer, variables, ask)
        lost = _lost(written, set(trained))
        kept = _not_by_design(written, lost)
        if len(kept) < len(lost):
            written = dataclasses.replace(written, remarks=(BY_DESIGN,))
        if kept:
            lossy = lossy or (written, kept)
        elif _writes_python(candidate, found):
            spare = spare or written
        else:
            return written
    if spare is not None:
        return spare
    raise UserError(_describe_lost(*lossy)) if lossy else refused


def _spellings(messages: Sequence[Mapping[str, Any]]) -> Iterator[Messages]:
    """The messages in the forms that templates may need, the documented form first."""
    plain = [_plain(message) for message in messages]
    called = any(message.get("tool_calls") for message in plain)
    reasoned = any(name in message for message in plain for name in REASONING)
    silent = any(message.get("content") is None for message in plain)
    for name in (None, *REASONING) if reasoned else (None,):
        for fill in (False, True) if silent else (False,):
            for as_text in (False, True) if called else (False,):
                yield [_spelling(message, name, fill=fill, as_text=as_text) for message in plain]
    if any(isinstance(message.get("content"), str) for message in plain):  # templates of models that also see images
        yield [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in plain
        ]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without "train" and without an empty list of calls, its arguments as objects."""
    plain = {key: value for key, value in message.items() if key != "train"}
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
    elif isinstance(plain["tool_calls"], list):
        plain["tool_calls"] = [_with_arguments(call, _as_object) for call in plain["tool_calls"]]
    return plain


def _spelling(message: dict[str, Any], name: str | None, *, fill: bool, as_text: bool) -> dict[str, Any]:
    spelt = dict(message)
    if name is not None and (texts := [spelt.pop(other) for other in REASONING if other in spelt]):
        spelt[name] = texts[0]
    if fill and spelt.get("content") is None:
        spelt["content"] = ""
    if as_text and "tool_calls" in spelt:
        spelt["tool_calls"] = [_with_arguments(call, _as_text) for call in spelt["tool_calls"]]
    return spelt


def _with_arguments(call: Any, change: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_arguments(call["function"], change)}
    return call | {"arguments": change(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        found = json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False, default=str) if isinstance(arguments, dict) else arguments


def _writes_python(messages: Messages, text: str) -> bool:
    """Whether arguments are written as Python shows an object, which means that the template expects text."""
    calls = [call for message in messages for call in message.get("tool_calls", ()) if isinstance(call, dict)]
    functions = [call.get("function", call) for call in calls]
    objects = [function.get("arguments") for function in functions if isinstance(function, dict)]
    return any(
        isinstance(found, dict) and found and str(found) in text and _as_text(found) not in text for found in objects
    )


def _with_tools(variables: Mapping[str, Any], marked: Marked | None) -> dict[str, Any]:
    return dict(variables) | ({"tools": marked.tools} if marked is not None and "tools" in variables else {})


def _marked(text: str, messages: Messages, tokenizer: Any, variables: Mapping[str, Any], ask: bool) -> Written:
    """The chat with marks at the edges of everything, or else on all words, or on contents only, or without marks."""
    written = functools.partial(Written, text, messages, variables, tokenizer)
    for edges, calls in ((True, True), (False, True), (False, False)):
        marked = Marked(messages, variables.get("tools"), calls=calls, edges=edges)
        try:
            again = render(
                marked.messages,
                tokenizer,
                add_generation_prompt=ask,
                variables=_with_tools(variables, marked),
            )
        except UserError:
            continue
        same, places = read_marks(again)
        if marked.sound and same == text and (not edges or _as_they_are(marked, dict(places), text)):
            return written(marked, tuple(places))
    return written(None, ())


def _as_they_are(marked: Marked, places: Mapping[int, int], text: str) -> bool:
    """Whether each text between marks at its edges is written as it is, or as JSON, or not at all."""
    for leaf in marked.leaves:
        found = [places[number] for number in leaf.marks if number in places]
        if len(leaf.marks) == 1 or not found:
            continue
        between = text[found[0] : found[-1]]
        if len(found) == 1 or (between != leaf.words[0] and between not in _forms(leaf.words[0])):
            return False
    return True


def _lost(written: Written, trained: set[int]) -> list[tuple[Leaf, list[str]]]:
    """(text, its missing words) for each text that the template must write and did not."""
    marked = written.marked or Marked(written.messages, written.variables.get("tools"), calls=False)
    seen = {number for number, _ in written.places}
    lost = []
    # Words between spaces are found at once; each of the others is searched for in the whole text.
    unmarked = written.marked is None or any(leaf.marks is None for leaf in marked.leaves)
    present = set(written.text.split()) if unmarked else set()
    for leaf in marked.leaves:
        if leaf.kind == "reasoning" and leaf.message not in trained:
            continue
        if written.marked is None or leaf.marks is None:
            words = [word for word in leaf.words if word not in present and not _stands_in(word, written.text)]
        else:  # of two marks at the edges either both are there or none is
            words = [word for number, word in zip(leaf.marks, leaf.words, strict=False) if number not in seen]
        if words:
            lost.append((leaf, words))
    lost += [
        (Leaf(path, message, "call", (str(value),), None), [json.dumps(value, default=str)])
        for message, path, value in marked.values
        if not is_written(value, written.text)
    ]
    return lost


def _stands_in(word: str, text: str) -> bool:
    return any(form in text for form in _forms(word))


def _forms(word: str) -> tuple[str, ...]:
    """A text as it is, and as JSON."""
    return word, json.dumps(word, ensure_ascii=False)[1:-1], json.dumps(word)[1:-1]


def _not_by_design(written: Written, lost: list[tuple[Leaf, list[str]]]) -> list[tuple[Leaf, list[str]]]:
    """What is lost, without the assistants' and system texts that the template does write while the chat ends there.

    One text of each kind is tried: reasoning or content, of an answer with calls or without; a system text.
    """
    tried: dict[tuple[str, bool], bool] = {}
    kept = []
    for leaf, words in lost:
        message = written.messages[leaf.message]
        kind = leaf.kind, bool(message.get("tool_calls"))
        said = message["role"] == "assistant" and leaf.kind in ("reasoning", "content")
        if leaf.message < 0 or not (said or message["role"] in ("system", "developer")):
            kept.append((leaf, words))
            continue
        end = leaf.message + 1 if said else _next_answer(written.messages, leaf.message)
        if end >= len(written.messages):
            kept.append((leaf, words))
            continue
        if kind not in tried:
            tried[kind] = _writes_alone(written, leaf, words, end)
        if not tried[kind]:
            kept.append((leaf, words))
    return kept


def _next_answer(messages: Messages, index: int) -> int:
    following = (place for place in range(index, len(messages)) if messages[place]["role"] == "assistant")
    return next(following, len(messages))


def _writes_alone(written: Written, leaf: Leaf, words: list[str], end: int) -> bool:
    """Whether the template writes a text if the chat ends at message `end`."""
    ask = written.messages[leaf.message]["role"] != "assistant"
    try:
        if written.marked is None or leaf.marks is None:
            text = written.again(written.messages[:end], ask=ask)
            return all(_stands_in(word, text) for word in words)
        _, places = read_marks(written.again(written.marked.messages[:end], ask=ask, marks=True))
    except UserError:
        return False
    return set(leaf.marks) <= {number for number, _ in places}


def _describe_lost(written: Written, lost: list[tuple[Leaf, list[str]]]) -> str:
    """The error message: what the template leaves out, and what to do about it."""
    shown = []
    for leaf, words in lost[:SHOWN]:
        found = " ".join(" ".join(words).split())
        shown.append(f"{leaf.path} ({found[:60] + '…' if len(found) > 60 else found!r})")
    rest = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    hints = {_hint(leaf, written.messages[leaf.message]["role"]): None for leaf, _ in lost}
    return f"the chat template leaves out {', '.join(shown)}{rest}; {'; '.join(hints)}"


def _hint(leaf: Leaf, role: str) -> str:
    if leaf.kind == "tool":
        return 'tools need a model whose template writes them; otherwise leave "tools" out'
    if leaf.kind == "call":
        return "calls need a model whose template writes them"
    if leaf.kind == "reasoning":
        return 'reasoning needs a template that writes it, or a turn with "train": false'
    if role in ("system", "developer"):
        return FOLD_HINT
    return f"the words of the role {role} need a template that writes them"
