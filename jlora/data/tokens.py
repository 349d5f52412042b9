"""Many texts through the tokenizer at once, which spreads them over its threads.

What encodes a record is a generator: it yields the texts whose tokens it needs and is sent these, so that the texts of
many records are tokenized together.
"""

import functools
import itertools
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import UserError

# What is tokenized together: enough for the threads, and few enough that memory does not notice. It begins with few,
# since records may be encoded faster once others of their kind have been.
FIRST_RECORDS = 4
MOST_RECORDS = 256
MOST_CHARACTERS = 4_000_000


class Text(NamedTuple):
    """A text to be tokenized, and whether the tokenizer adds special tokens to it."""

    text: str
    special: bool = False


class Tokens:
    """The tokens of a text: `ids`, int32 [T]."""

    def __init__(self, ids: Sequence[int], encoding: Any = None) -> None:
        """`encoding` knows where the tokens are in the text; None for tokenizers that do not say."""
        self.ids = np.asarray(ids, np.int32)
        self._encoding = encoding

    @functools.cached_property
    def offsets(self) -> np.ndarray | None:
        """Where each token begins and ends in the text, [T, 2]; None if that is not known."""
        if self._encoding is None:
            return None
        flat = itertools.chain.from_iterable(self._encoding.offsets)
        return np.fromiter(flat, np.int64, 2 * len(self.ids)).reshape(-1, 2)


Encoding = Generator[Sequence[Text], Sequence[Tokens], Any]


def plain_text(text: str, tokenizer: Any) -> Text:
    """A text that no template wrote.

    If it begins with the beginning-of-text token, as a rendered chat does, it does not get a second one.
    """
    return Text(text, special=not (tokenizer.bos_token and text.startswith(tokenizer.bos_token)))


def tokenize(texts: Sequence[Text], tokenizer: Any) -> list[Tokens]:
    """The tokens of each text.

    Raises:
        UserError: the tokenizer fails on a text in any way (a lone surrogate, for instance, has no bytes), or the model
            has no row for some of its tokens.
    """
    found: dict[int, Tokens] = {}
    for special in (False, True):
        places = [place for place, text in enumerate(texts) if text.special is special]
        if places:
            tokens = _tokenize([texts[place].text for place in places], tokenizer, special)
            found |= zip(places, tokens, strict=True)
    return [found[place] for place in range(len(texts))]


def encode_together(
    given: Iterable[Any], encode: Callable[[Any], Encoding], tokenizer: Any
) -> Iterator[tuple[Any, Any]]:
    """(one of what is given, what its generator returned or the UserError that it ended with) for each, in order."""
    runs: list[_Run] = []
    characters, most = 0, FIRST_RECORDS
    for one in given:
        runs.append(_Run(one, encode(one)))
        characters += sum(len(text.text) for text in runs[-1].texts)
        if len(runs) == most or characters >= MOST_CHARACTERS:
            yield from _finish(runs, tokenizer)
            runs, characters, most = [], 0, min(2 * most, MOST_RECORDS)
    yield from _finish(runs, tokenizer)


def encode_alone(encoding: Encoding, tokenizer: Any) -> Any:
    """What one generator returns; raises what it raises."""
    [(_, found)] = _finish([_Run(None, encoding)], tokenizer)
    if isinstance(found, UserError):
        raise found
    return found


class _Run:
    """A generator on its way: the texts that it waits for, or what came of it."""

    def __init__(self, given: Any, encoding: Encoding) -> None:
        self.given, self._encoding = given, encoding
        self.send(None)

    def send(self, tokens: Sequence[Tokens] | None) -> None:
        try:
            self.texts = self._encoding.send(tokens)
        except StopIteration as end:
            self.end(end.value)
        except UserError as error:
            self.end(error)

    def end(self, found: Any) -> None:
        self.texts, self.found = (), found


def _finish(runs: Sequence[_Run], tokenizer: Any) -> Iterator[tuple[Any, Any]]:
    while asking := [run for run in runs if run.texts]:
        try:
            tokens = iter(tokenize([text for run in asking for text in run.texts], tokenizer))
        except UserError as error:
            if len(asking) == 1:
                asking[0].end(error)
            for run in asking[1:] and asking:  # whose text it was shows when they are tokenized one by one
                try:
                    run.send(tokenize(run.texts, tokenizer))
                except UserError as own:
                    run.end(own)
            continue
        for run in asking:
            run.send(list(itertools.islice(tokens, len(run.texts))))
    for run in runs:
        yield run.given, run.found


def _tokenize(texts: list[str], tokenizer: Any, special: bool) -> list[Tokens]:
    try:
        found = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # tokenizers written in Rust raise plain Exceptions
        for text in texts:
            if lone := re.search("[\ud800-\udfff]", text):
                around = text[max(0, lone.start() - 20) : lone.end() + 20]
                reason = (
                    f"found {lone[0]!r} near {around!r}, half of a character (a lone surrogate), expected whole ones"
                )
                break
        else:
            reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the tokenizer cannot read the text: {reason}") from error
    fast = getattr(tokenizer, "is_fast", False)
    return list(map(Tokens, found["input_ids"], found.encodings if fast else [None] * len(texts)))
