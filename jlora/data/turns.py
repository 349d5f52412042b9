"""Where the turns of a rendered chat start and end in its tokens.

Marks show where each message's words are. What a template writes between two turns is learned from the first such pair
of each kind, so that a chat of n messages is rendered a few times, not n times.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.data.marks import read_marks
from jlora.data.rendered import Written
from jlora.data.template import common_prefix, rendered_tokens, special_tokens
from jlora.data.tokens import Tokens
from jlora.errors import UserError

# Put in place of a turn's words, it shows where a template writes them.
SHOWN_AS = "\N{OBJECT REPLACEMENT CHARACTER}"
_PIECE = re.compile(r"<[^<>]*>|\s+|[^<\s]+|<")
_KINDS = 8  # remembered ways in which turns of one kind follow each other


class Run(NamedTuple):
    """Where a message's words are contiguous in the text, and where the words before them end and the next start."""

    before: int
    first: int
    last: int
    following: int
    number: int  # number of its last mark


class Turns:
    """The turns of a chat.

    Args:
        written: the chat.
        tokens: the tokens of its text.
        ending: the special tokens that end an answer, in order; () if the template writes none.
        known: the runs of each message's words and where turns start, of a chat without marks; only turns that
            `have_ends` vouches for can be asked for.

    Attributes:
        written: the chat.
        tokens: int32 [T].
        runs: for each message, the runs of its words in the text: mostly just one.
    """

    def __init__(
        self,
        written: Written,
        tokens: Tokens,
        ending: tuple[int, ...],
        *,
        known: tuple[dict[int, list[Run]], dict[int, int]] | None = None,
    ) -> None:
        self.tokens, self._offsets = tokens.ids, tokens.offsets
        self.written, self._ending = written, ending
        self._known: dict[tuple, list[tuple[str, int]]] = {}
        self._closings: dict[tuple, int] = {}
        self._opening: str | None = None
        self.runs, self._starts = known or (self._find_runs(), {})

    @functools.cached_property
    def _special(self) -> set[int]:
        return special_tokens(self.written.tokenizer)

    def start(self, index: int) -> int:
        """The index of a turn's first token: the first one that the model writes when this turn is its answer."""
        if index not in self.runs:
            return self._by_prefix(index)[0]
        return self._token(self.start_place(index))

    def places(self, index: int) -> np.ndarray:
        """The indices of a turn's tokens in order, its stop token included.

        They have gaps if the template writes other words in between: Gemma 4 writes a tool's result between a call and
        what is said beside it.
        """
        if index not in self.runs:
            return np.arange(*self._by_prefix(index))
        *others, last = self.runs[index]
        ends = [self._token(self._closing(index, run, alone=True)) for run in others] + [self._end(index, last)]
        starts = [self.start(index), *(self._token(run.first) for run in self.runs[index][1:])]
        return np.concatenate([np.arange(*pair) for pair in zip(starts, ends, strict=True)])

    def have_ends(self) -> bool:
        """Whether the tokens that end an answer follow the words of every assistant's turn."""
        return all(
            self._behind_ending(self._token(run.last), self._token(run.following)) is not None
            for index, runs in self.runs.items()
            for run in runs
            if self.written.messages[index]["role"] == "assistant"
        )

    def _end(self, index: int, run: Run) -> int:
        """The end (exclusive) of a turn, after its stop token."""
        first, end = self._token(run.last), self._token(run.following)
        if (ended := self._behind_ending(first, end)) is not None:
            return ended
        if index + 1 == len(self.written.messages):
            return len(self.tokens)
        return self._token(self._closing(index, run))

    def _behind_ending(self, first: int, end: int) -> int | None:
        """The index after the tokens that end an answer, where these first are in a range; None if they are not."""
        stops = np.flatnonzero(self.tokens[first:end] == self._ending[0]) if self._ending else ()
        if not len(stops):
            return None
        place = first + int(stops[0])
        return place + common_prefix(self.tokens[place:], np.array(self._ending))

    def _find_runs(self) -> dict[int, list[Run]]:
        marked, places, found = self.written.marked, self.written.places, {}
        if marked is None:
            return {}
        owners = [marked.owners[number] for number, _ in places]
        edges = [place for place in range(len(owners)) if not place or owners[place] != owners[place - 1]]
        for begin, end in zip(edges, [*edges[1:], len(owners)], strict=True):
            before = places[begin - 1][1] if begin else 0
            following = places[end][1] if end < len(places) else len(self.written.text)
            run = Run(before, places[begin][1], places[end - 1][1], following, places[end - 1][0])
            found.setdefault(owners[begin], []).append(run)
        return found

    def _token(self, place: int) -> int:
        """The index of the first token that ends after a place in the text."""
        if place >= len(self.written.text):
            return len(self.tokens)
        if self._offsets is not None:
            return int(np.searchsorted(self._offsets[:, 1], place, side="right"))
        return common_prefix(rendered_tokens(self.written.text[:place], self.written.tokenizer), self.tokens)

    def start_place(self, index: int) -> int:
        """Where a turn of a message in `runs` starts in the text: after what the template writes to ask for it."""
        if index in self._starts:
            return self._starts[index]
        before, first = self.runs[index][0].before, self.runs[index][0].first
        gap = self.written.text[before:first]
        kind = self._kind(index)
        for asked, least in self._known.get(kind, ()):
            if (found := _fit(asked, least, gap)) is not None:
                return before + found
        if (learnt := self._ask(index, gap)) is not None:
            known = self._known.setdefault(kind, [])
            if len(known) < _KINDS:
                known.append(learnt)
            if (found := _fit(*learnt, gap, exact=True)) is not None:
                return before + found
        return before + self._behind_opening(index, gap)

    def _kind(self, index: int) -> tuple:
        messages = self.written.messages
        before = messages[index - 1] if index else {}
        return index == 0, messages[index]["role"], before.get("role"), bool(before.get("tool_calls"))

    def _ask(self, index: int, gap: str) -> tuple[str, int] | None:
        """What the template writes to ask for a turn, and how much of it it writes when it does not ask.

        Both follow the last word before the turn. None if this cannot be told.
        """
        marked, places = self.written.marked, self.written.places
        own = next(place for place, (number, _) in enumerate(places) if marked.owners[number] == index)
        if not index or not own:
            return None
        last = places[own - 1][0]
        try:
            asked = self._behind(index, last, ask=True)
            if asked is None:
                return None
            if gap.startswith(asked):
                return asked, len(asked)
            base = self._behind(index, last, ask=False)
        except UserError:
            return None
        return None if base is None else (asked, len(base))

    def _behind(self, index: int, last: int, *, ask: bool) -> str | None:
        """What the template writes after a mark if the chat ends before a message; None if another mark is last."""
        text, places = read_marks(self.written.again(self.written.marked.messages[:index], ask=ask, marks=True))
        return text[places[-1][1] :] if places and places[-1][0] == last else None

    def _behind_opening(self, index: int, gap: str) -> int:
        """Where a turn starts in the gap before it.

        That is after the opening of an answer, as the template writes it at the end of the chat, or else at the words
        themselves.
        """
        pieces = _PIECE.findall(self._ask_again())
        while pieces:
            opening = "".join(pieces)
            if opening.strip() and gap.count(opening) == 1:
                return gap.index(opening) + len(opening)
            pieces.pop()
        content = self.written.messages[index].get("content")
        leading = content[: len(content) - len(content.lstrip())] if isinstance(content, str) else ""
        return len(gap) - len(leading) if gap.endswith(leading) else len(gap)

    def _ask_again(self) -> str:
        """What the template writes after the chat to ask for one more answer; "" if it rewrites the chat for that."""
        if self._opening is None:
            text = self.written.text
            try:
                asked = self.written.again(self.written.messages, ask=True)
            except UserError:
                asked = ""
            self._opening = asked[len(text) :] if asked.startswith(text) else ""
        return self._opening

    def _closing(self, index: int, run: Run, *, alone: bool = False) -> int:
        """Where a turn ends in the text: after what the template writes there when the chat ends with the turn.

        With `alone`, after what it writes when the chat ends with the turn without its content. Another special token
        may replace the last one: gpt-oss ends earlier answers with a token of its own.
        """
        region = self.written.text[run.last : run.following]
        message = self.written.messages[index]
        content = message.get("content")
        trailing = content[len(content.rstrip()) :] if isinstance(content, str) and not alone else ""
        own = len(trailing) if region.startswith(trailing) else 0
        key = bool(message.get("tool_calls")), alone, own == len(trailing), region[own:]
        if key not in self._closings:
            tail = self._tail(index, run.number, alone=alone)
            kept = _whole(tail, len(_alike(tail, region)))
            if kept < len(tail):
                kept = self._special_behind(index, run.last + kept) - run.last
            self._closings[key] = max(0, kept - own)
        return run.last + own + self._closings[key]

    def _tail(self, index: int, number: int, *, alone: bool) -> str:
        """What the template writes after a mark when the chat ends with a turn; "" if it refuses such a chat."""
        *before, message = self.written.marked.messages[: index + 1]
        try:
            written = self.written.again([*before, message | {"content": ""} if alone else message], marks=True)
        except UserError:
            return ""
        text, places = read_marks(written)
        return text[places[-1][1] :] if places and places[-1][0] == number else ""

    def _special_behind(self, index: int, place: int) -> int:
        """The end of the special token at a place in the text; the place itself without one, or if it opens a turn."""
        token = self._token(place)
        if self._offsets is None or token == len(self.tokens) or self._offsets[token, 0] != place:
            return place
        end = int(self._offsets[token, 1])
        text = self.written.text[place:end]
        following = self.written.messages[index + 1]["role"] if index + 1 < len(self.written.messages) else ""
        opens = text in self._ask_again() or (following and following in text.lower())
        return place if int(self.tokens[token]) not in self._special or opens else end

    def _by_prefix(self, index: int) -> tuple[int, int]:
        """(start, end) of a turn without marks, from what the template writes for the messages before it."""
        written, text = self.written, self.written.text
        asked = base = None
        if index:
            try:
                asked = written.again(written.messages[:index], ask=True)
                base = asked if text.startswith(asked) else written.again(written.messages[:index])
            except UserError:
                base = None
        known = base is not None and text.startswith(base)
        if known:
            whole = _whole(asked, len(_alike(asked, text)))
            start, end = self._token(len(asked) if text.startswith(asked) else max(len(base), whole)), None
        else:  # what comes before is written differently without the rest: the turn is what changes with its words
            start, end = self._by_change(index)
        later = [runs[0].first for other, runs in self.runs.items() if other > index]
        if (ended := self._behind_ending(start, self._token(min(later, default=len(text))))) is not None:
            return start, ended
        if index + 1 == len(written.messages):
            return start, len(self.tokens)
        if end is None:
            try:
                end = self._token(len(_alike(written.again(written.messages[: index + 1]), text)))
            except UserError:
                _, end = self._by_change(index)
        return start, end

    def _by_change(self, index: int) -> tuple[int, int]:
        written, text = self.written, self.written.text
        message = written.messages[index]
        other: Mapping[str, Any] = {"content": SHOWN_AS}
        other |= {name: SHOWN_AS for name in ("reasoning_content",) if message.get(name)}
        changed = written.again([*written.messages[:index], message | other, *written.messages[index + 1 :]])
        first = len(_alike(text, changed))
        end = len(text) - len(_alike(text[first:][::-1], changed[first:][::-1]))
        return self._token(first), self._token(end)


def _fit(asked: str, least: int, gap: str, *, exact: bool = False) -> int | None:
    """How much of a gap between two turns asks for the second one; None if the gap is of another kind.

    The spaces at the end of the first turn's words may differ, except with `exact`.
    """
    spaces, other = (len(text) - len(text.lstrip()) for text in (asked, gap))
    if not exact and (not asked.strip() or not gap.strip()):
        return len(asked) if gap.startswith(asked) else None
    if exact:
        spaces = other = 0
    shared = len(_alike(asked[spaces:], gap[other:]))
    if spaces + shared < len(asked):
        shared = _whole(asked[spaces:], shared)
        if spaces + shared < least:
            return None
    return other + shared


def _whole(text: str, shared: int) -> int:
    """How much of the first `shared` characters is whole pieces (a tag, a word, spaces): not "<t" of "<think>"."""
    return max((piece.end() for piece in _PIECE.finditer(text) if piece.end() <= shared), default=0)


def _alike(first: str, second: str) -> str:
    """The common start of two texts."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return first[:low]
