"""From tokens to text, one by one: characters come out whole, and a text ends before its stop string."""

from collections.abc import Sequence
from typing import Any

from jlora.data.template import special_tokens

UNFINISHED = "\ufffd"  # what a tokenizer writes for the bytes of a character that is not complete


class Words:
    """The text of tokens that arrive one by one; the pieces together are what the tokenizer makes of all of them.

    Args:
        kept: special tokens whose text is told; that of others is left out.
        begun: tokens before the first that is added, whose text is told with that one's.

    Attributes:
        stopped: whether a stop string was found. Nothing comes out after that.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), kept: Sequence[int] = (), begun: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._hidden = special_tokens(tokenizer) - {*kept} if kept else None
        self._tokens = [*begun]
        # Tokens from the first on are decoded again, so that those from the second on read as they do in the whole.
        self._first, self._second = 0, 0
        self._held, self.stopped = "", False

    def add(self, token: int) -> str:
        """What this token lets be told."""
        self._tokens.append(token)
        return self._tell(self._new())

    def end(self) -> str:
        """What had been kept back."""
        text = self._tell(self._new(last=True))
        return text if self.stopped else text + self._held

    def _new(self, last: bool = False) -> str:
        """The text of new tokens, as far as its characters are complete."""
        before = self._text(self._tokens[self._first : self._second])
        whole = self._text(self._tokens[self._first :])
        if len(whole) <= len(before) or (whole.endswith(UNFINISHED) and not last):
            return ""
        self._first, self._second = self._second, len(self._tokens)
        return whole[len(before) :]

    def _text(self, tokens: Sequence[int]) -> str:
        if self._hidden is None:
            return self._tokenizer.decode(tokens, skip_special_tokens=True)
        return self._tokenizer.decode([token for token in tokens if token not in self._hidden])

    def _tell(self, new: str) -> str:
        """The text that is no part of a stop string, nor of what may become one."""
        if self.stopped:
            return ""
        text = self._held + new
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = max((begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def begun(text: str, stop: str) -> int:
    """How many of the last characters of the text are the first of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if text.endswith(stop[:count])), 0)
