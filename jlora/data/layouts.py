"""Chats that are written as others before them: their turns are found in a single rendering.

What a template writes between two messages is learned from the first chat of a kind, with its marks. Where a later chat
is exactly its messages with what was learned between them, each message is where it should be; any other chat is
marked as well.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlora.data.rendered import Messages, Written, write
from jlora.data.template import render, template_ending
from jlora.data.tokens import Encoding, Text
from jlora.data.turns import Run, Turns
from jlora.errors import UserError

PLAIN_KEYS = {"role", "content", "train"}
MOST_KINDS = 4096


class Layouts:
    """What a tokenizer's template writes between the messages of chats.

    The tokenizer has a template if there are chats.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # For each kind of message, the texts before it and where in them a turn starts (None: not known).
        self._gaps: dict[tuple, dict[str, int | None]] = {}

    @functools.cached_property
    def ending(self) -> tuple[int, ...]:
        """The special tokens that end an answer, in order; () if the template writes none."""
        return template_ending(self.tokenizer)

    def turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        trained: Sequence[int],
        remark: Callable[[str], Any],
    ) -> Encoding:
        """The generator of a chat's `Turns`; see `write` for `variables`, `trained` and what it raises."""
        kinds, text = self._kinds(messages, variables), None
        if kinds:
            plain = [{"role": message["role"], "content": message["content"]} for message in messages]
            try:
                text = render(plain, self.tokenizer, variables=variables)
            except UserError:
                kinds = []
            if kinds and (found := self._read(kinds, plain, text)):
                [tokens] = yield [Text(text)]
                written = Written(text, plain, variables, self.tokenizer, None, ())
                turns = Turns(written, tokens, self.ending, known=found)
                if turns.have_ends():
                    return turns
        written = write(messages, self.tokenizer, variables, trained=trained, text=text)
        for what in written.remarks:
            remark(what)
        [tokens] = yield [Text(written.text)]
        turns = Turns(written, tokens, self.ending)
        if kinds and not written.remarks:
            self._learn(kinds, written, turns)
        return turns

    def _kinds(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[tuple]:
        """The kind of each message, and of the end of the chat; [] for chats that are always marked.

        A kind is what can play a part in what a template writes before a message, its words aside.
        """
        if not self.ending or not messages:
            return []
        contents = [message.get("content") for message in messages]
        if not all(map(_is_plain, messages, contents)):
            return []
        roles = [message["role"] for message in messages]
        chat = repr(variables) if variables else "", frozenset(roles)
        kinds, before, trailing = [], None, ""
        for index, (role, content) in enumerate(zip(roles, contents, strict=True)):
            leading = content[: len(content) - len(content.lstrip())]
            kinds.append((chat, index == 0, index == len(roles) - 1, before, trailing, role, leading))
            before, trailing = role, content[len(content.rstrip()) :]
        return [*kinds, (chat, before, trailing)]

    def _read(self, kinds: Sequence[tuple], messages: Messages, text: str) -> tuple[dict, dict] | None:
        """Each message's run, and where turns start; None if the text is not of known kinds."""
        place, edges, starts = 0, [], {}
        for index, message in enumerate(messages):
            words = message["content"].strip()
            fitting = [
                (gap, start)
                for gap, start in self._gaps.get(kinds[index], {}).items()
                if text.startswith(gap, place) and text.startswith(words, place + len(gap))
            ]
            if len(fitting) != 1:
                return None
            [(gap, start)] = fitting
            if start is not None:
                starts[index] = place + start
            edges.append((place, place + len(gap), place + len(gap) + len(words)))
            place = edges[-1][2]
        if text[place:] not in self._gaps.get(kinds[-1], {}):
            return None
        following = [*(first for _, first, _ in edges[1:]), len(text)]
        runs = {
            index: [Run(*edge, after, -1)] for index, (edge, after) in enumerate(zip(edges, following, strict=True))
        }
        return runs, starts

    def _learn(self, kinds: Sequence[tuple], written: Written, turns: Turns) -> None:
        messages, place, gaps = written.messages, 0, []
        for index, message in enumerate(messages):
            match turns.runs.get(index):
                case [run] if run.before == place and _says(message, written.text[run.first : run.last]):
                    start = turns.start_place(index) - place if message["role"] == "assistant" else None
                    gaps.append((written.text[place : run.first], start))
                    place = run.last
                case _:
                    return
        if len(self._gaps) > MOST_KINDS:
            self._gaps.clear()
        for kind, (gap, start) in zip(kinds, [*gaps, (written.text[place:], None)], strict=True):
            self._gaps.setdefault(kind, {})[gap] = start


def _says(message: Mapping[str, Any], words: str) -> bool:
    content = message["content"]
    return isinstance(content, str) and content.strip() == words


def _is_plain(message: Mapping[str, Any], content: Any) -> bool:
    """Whether a message is a role and a text without a tag at its edges, before or behind which marks would be."""
    return (
        isinstance(content, str)
        and PLAIN_KEYS.issuperset(message)
        and isinstance(message.get("role"), str)
        and (words := content.strip()) != ""
        and words[0] not in "<["
        and words[-1] not in ">]"
    )
