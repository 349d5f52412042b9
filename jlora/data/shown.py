"""What is trained, for a person to look at: tokens with their loss mask, packed rows, lengths. Prints nothing."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from jlora.data.packing import Step
from jlora.data.store import Example, Items
from jlora.errors import number_of

BARS = 12  # of a histogram
WIDTH = 64  # characters of a row's picture
OPEN, CLOSE = "«", "»"  # around trained tokens where there are no colours
LEGEND = "trained tokens in green, others in grey, special ones in magenta; shades alternate from token to token"
PLAIN_LEGEND = f"trained tokens are between {OPEN} and {CLOSE}"
_TRAINED, _READ, _SPECIAL = ("bold green", "bold bright_green"), ("bright_black", "white"), "magenta"
_DOCUMENTS = ("cyan", "yellow", "blue", "bright_red")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Piece(NamedTuple):
    """A token's text (or the text of several, where they share a character), and whether it is trained or special."""

    text: str
    trained: bool
    special: bool


def pieces(example: Example, tokenizer: Any) -> Iterator[Piece]:
    """The text of an example, token by token."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    waiting: list[int] = []
    for place, token in enumerate(example.tokens.tolist()):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        last = place + 1 == len(example.tokens) or len(waiting) == 4  # a character has up to four bytes
        if _UNKNOWN in text and not last:
            continue
        yield Piece(text, bool(example.trained[place]), token in special)
        waiting = []


def marked(example: Example, tokenizer: Any, *, colours: bool) -> Text:
    """The text of an example with its trained tokens marked."""
    found, before = Text(), False
    for number, piece in enumerate(pieces(example, tokenizer)):
        text = piece.text.replace("\n", "⏎\n")
        if not colours and piece.trained != before:
            found.append(OPEN if piece.trained else CLOSE)
        before = piece.trained
        style = _SPECIAL if piece.special else (_TRAINED if piece.trained else _READ)[number % 2]
        found.append(text, f"{style} underline" if piece.special and piece.trained else style)
    if before and not colours:
        found.append(CLOSE)
    return found


def pictured(step: Step, examples: Sequence[Example]) -> Iterator[Text]:
    """Each row of a step as a line: a block for each document, full where it is trained, dots for padding."""
    for number, row in enumerate(step.rows, start=1):
        line, used = Text(f"row {number:>3} "), sum(len(examples[index].tokens) for index in row)
        scale = WIDTH / max(step.length, used, 1)
        drawn = end = 0
        for place, index in enumerate(row):
            trained = examples[index].trained
            end += len(trained)
            width = max(1, round(end * scale) - drawn)
            drawn += width
            parts = np.array_split(trained, width) if len(trained) >= width else [trained] * width
            text = "".join("█" if part.mean() > 0.5 else "░" for part in parts)
            line.append(text, _DOCUMENTS[place % len(_DOCUMENTS)])
        line.append("·" * (WIDTH - drawn), "bright_black")
        line.append(f" {used} of {number_of(step.length, 'token')}, {number_of(len(row), 'document')}")
        yield line


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(least, most, count) of each of a few ranges of lengths, of round and equal widths."""
    least, most = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(most - least + 1) // BARS))
    unit = 10 ** (len(str(width)) - 1)
    width = -(-width // unit) * unit
    first = least // width * width
    counts = np.bincount((lengths - first) // width, minlength=(most - first) // width + 1)
    return [(first + n * width, first + (n + 1) * width - 1, int(count)) for n, count in enumerate(counts)]


def drawn(lengths: np.ndarray) -> Table:
    """A histogram as a table with bars."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    bars = histogram(lengths)
    most = max(count for *_, count in bars)
    for least, end, count in bars:
        bar = "█" * round(count / most * WIDTH) or ("▏" if count else "")
        table.add_row(f"{least}-{end}" if end > least else f"{least}", f"{count:,}", Text(bar, "cyan"))
    table.columns[0].justify = table.columns[1].justify = "right"
    return table


def padding(steps: Sequence[Step], items: Items) -> float:
    """The share of the steps' tokens that are padding, if no documents share their start."""
    lengths = items.examples.lengths
    room = sum(step.length * len(step.rows) for step in steps)
    used = sum(int(lengths[list(row)].sum()) for step in steps for row in step.rows)
    return max(0.0, 1 - used / room)
