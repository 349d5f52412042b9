"""Marks on the words of a chat, which show where a template writes each word, and which words it leaves out.

A mark is a private-use character before a word, after the last word of a text, or after the name of an argument.
Templates do not treat it specially, so it is written wherever its word is. Tags such as <think> are not marked, since
templates look for them. Most templates write a text as it is, and then marks before its first word and after its last
one say as much.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# The two private-use planes, without the last two code points of each, which are not characters.
_PLANES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
MARK = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
MOST = 100_000  # marks in one chat: in longer ones only every second word, or fewer, is marked

REASONING = ("reasoning_content", "reasoning", "thinking")
_REASONED = re.compile(r"</think>|</thinking>|</reasoning>|\[/THINK\]|<channel\|>")
_TAG = re.compile(r"(</?[A-Za-z_][\w.:-]*>|\[/?[A-Z_]+\])")
_WORD = re.compile(r"\S+")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A text of a chat that a template must write.

    Attributes:
        path: where it is in the record.
        message: index of its message; -1 for a tool.
        kind: "content", "reasoning", "call" or "tool".
        words: its marked words; all its words if the text has no marks. With marks at its edges, the text between them.
        marks: numbers of the marks that are there if it is: one before each word, or both edges; None if the text has
            no marks.
    """

    path: str
    message: int
    kind: str
    words: tuple[str, ...]
    marks: range | None


class Marked:
    """The messages and tools of a chat with marks, and what was marked.

    Args:
        messages: the chat's messages; their `arguments` are objects or text.
        tools: the record's tools, or None.
        calls: whether tools and calls are marked too, which not every template can read.
        edges: whether a text is marked at its edges only, not before each word.
    """

    def __init__(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, *, calls: bool = True, edges: bool = False
    ) -> None:
        self.leaves: list[Leaf] = []
        self.owners: list[int] = []  # index of each mark's message
        self.values: list[tuple[int, str, Any]] = []  # (message, path, value) of arguments that are not text
        self.sound = True  # no text of the chat contains a mark's character itself
        self._calls, self._edges = calls, edges
        self._every = 1 if edges else 1 + _count_words(messages) // MOST
        self.messages = [self._message(index, message) for index, message in enumerate(messages)]
        self.tools = [self._tool(index, tool) for index, tool in enumerate(tools)] if isinstance(tools, list) else tools

    def _message(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        marked, where = dict(message), f"messages[{index}]"
        for name in REASONING:
            if isinstance(message.get(name), str):
                marked[name] = self._text(message[name], f"{where}.{name}", index, "reasoning")
        content = message.get("content")
        if isinstance(content, str):
            marked["content"] = self._content(content, f"{where}.content", index, message["role"])
        elif isinstance(content, list):
            marked["content"] = [
                part | {"text": self._content(part["text"], f"{where}.content[{place}].text", index, message["role"])}
                if isinstance(part, dict) and isinstance(part.get("text"), str)
                else part
                for place, part in enumerate(content)
            ]
        if isinstance(message.get("tool_calls"), list):
            marked["tool_calls"] = [
                self._call(call, f"{where}.tool_calls[{place}]", index)
                for place, call in enumerate(message["tool_calls"])
            ]
        return marked

    def _content(self, value: str, path: str, index: int, role: str) -> str:
        """The content with marks; in an assistant's, everything before the end of its reasoning is a separate text."""
        ends = list(_REASONED.finditer(value)) if role == "assistant" else []
        if not ends:
            return self._text(value, path, index, "content")
        end = ends[-1].start()
        return self._text(value[:end], path, index, "reasoning") + self._text(value[end:], path, index, "content")

    def _call(self, call: Any, where: str, index: int) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return call | {"function": self._call(call["function"], f"{where}.function", index)}
        marked = dict(call)
        if isinstance(call.get("name"), str):
            marked["name"] = self._text(call["name"], f"{where}.name", index, "call", plain=not self._calls)
        if "arguments" in call:
            marked["arguments"] = self._argument(call["arguments"], f"{where}.arguments", index)
        return marked

    def _argument(self, value: Any, where: str, index: int) -> Any:
        if isinstance(value, dict):
            return {
                self._name(name, f"{where}[{name!r}]", index): self._argument(item, f"{where}[{name!r}]", index)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._argument(item, f"{where}[{place}]", index) for place, item in enumerate(value)]
        if isinstance(value, str):
            return self._text(value, where, index, "call", plain=not self._calls)
        self.values.append((index, where, value))
        return value

    def _name(self, name: str, path: str, index: int) -> str:
        """An argument's name with its mark after it, because templates sort by names."""
        if not self._calls:
            self.leaves.append(Leaf(path, index, "call", (name,), None))
            return name
        self.leaves.append(Leaf(path, index, "call", (name,), range(len(self.owners), len(self.owners) + 1)))
        return name + self._mark(index)

    def _tool(self, index: int, tool: Any) -> Any:
        if not isinstance(tool, dict):
            return tool
        function = tool.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            path = f"tools[{index}].function.name"
            return tool | {
                "function": function | {"name": self._text(function["name"], path, -1, "tool", plain=not self._calls)}
            }
        if isinstance(tool.get("name"), str):
            return tool | {"name": self._text(tool["name"], f"tools[{index}].name", -1, "tool", plain=not self._calls)}
        return tool

    def _text(self, value: str, path: str, index: int, kind: str, *, plain: bool = False) -> str:
        """The text with marks before its words and one after the last; with `plain` it is noted but not marked."""
        self.sound = self.sound and (value.isascii() or not MARK.search(value))
        parts = _TAG.split(value) if "<" in value or "[" in value else [value]
        if plain:
            words = [word for part in parts[::2] for word in _WORD.findall(part)]
            if words:
                self.leaves.append(Leaf(path, index, kind, tuple(words), None))
            return value
        if self._edges:
            return self._between_marks(parts, path, index, kind)
        first, words, last = len(self.owners), [], None

        def mark(found: re.Match) -> str:
            nonlocal count
            count += 1
            if (count - 1) % self._every:
                return found[0]
            words.append(found[0])
            return self._mark(index) + found[0]

        count = 0
        for place in range(0, len(parts), 2):
            before = count
            parts[place] = _WORD.sub(mark, parts[place])
            last = place if count > before else last
        if last is not None:
            kept = parts[last].rstrip()
            parts[last] = kept + self._mark(index) + parts[last][len(kept) :]
            self.leaves.append(Leaf(path, index, kind, tuple(words), range(first, first + len(words))))
        return "".join(parts)

    def _between_marks(self, parts: list[str], path: str, index: int, kind: str) -> str:
        """The text with a mark before its first word and one after its last, where `_text` has its outermost marks."""
        wordy = [place for place in range(0, len(parts), 2) if parts[place] and not parts[place].isspace()]
        if not wordy:
            return "".join(parts)
        if len(self.owners) + 2 > MOST:
            self.sound = False
            return "".join(parts)
        first, last = wordy[0], wordy[-1]
        before = "".join(parts[:first]) + parts[first][: len(parts[first]) - len(parts[first].lstrip())]
        after = parts[last][len(parts[last].rstrip()) :] + "".join(parts[last + 1 :])
        whole = "".join(parts)
        text = whole[len(before) : len(whole) - len(after)]
        self.leaves.append(Leaf(path, index, kind, (text,), range(len(self.owners), len(self.owners) + 2)))
        return before + self._mark(index) + text + self._mark(index) + after

    def _mark(self, index: int) -> str:
        number = len(self.owners)
        self.owners.append(index)
        first = len(_PLANES[0])
        return chr(_PLANES[0][number] if number < first else _PLANES[1][number - first])


def read_marks(written: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and (number of the mark, its place in that text) for each, in order.

    If a word is written twice, such as a call's name that a template repeats before the result, its first place counts.
    """
    places: dict[int, int] = {}
    for before, found in enumerate(MARK.finditer(written)):
        places.setdefault(_number(found[0]), found.start() - before)
    return MARK.sub("", written), list(places.items())


def is_written(value: Any, text: str) -> bool:
    """Whether a number, a boolean or a null is in a text, as JSON, Python or a template may write it."""
    if value is None:
        return True  # some templates write nothing
    forms = {str(value), json.dumps(value, default=str), str(value).lower()}
    if isinstance(value, float) and value.is_integer():
        forms.add(str(int(value)))
    return any(form in text for form in forms)


def _number(mark: str) -> int:
    point = ord(mark)
    return point - _PLANES[0][0] if point < _PLANES[1][0] else len(_PLANES[0]) + point - _PLANES[1][0]


def _count_words(messages: Sequence[Mapping[str, Any]]) -> int:
    """An upper bound on the number of marks: every text is counted, whatever it is for."""

    def count(value: Any) -> int:
        if isinstance(value, str):
            return 2 + value.count(" ") + value.count("\n") + value.count("\t") + value.count("<") + value.count("[")
        if isinstance(value, dict):
            return sum(count(item) + 2 for item in value.values())
        return sum(map(count, value)) if isinstance(value, list) else 0

    return sum(map(count, messages))
