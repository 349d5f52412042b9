"""Which request has which row of the batch, and what rows still hold of earlier ones. Nothing here is on a device."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jlora.serve.request import Listener, Piece, Request, Usage
from jlora.serve.shelf import Held
from jlora.serve.words import Words

# A prefix of fewer tokens is sooner read than copied, or waited for.
WORTH = 16


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        held: the adapter, or None for the base alone.
        place: its number in the bank.
        drawn: the new tokens so far.
        steps: how many were asked of the device: one more than `drawn` has, while a step is under way.
        cached: how many tokens of the prompt did not have to be read.
    """

    request: Request
    listener: Listener
    words: Words
    held: Held | None = None
    place: int = 0
    drawn: list[int] = dataclasses.field(default_factory=list)
    steps: int = 0
    cached: int = 0
    finish: str | None = None

    @property
    def adapter(self) -> str | None:
        """Tells adapters apart: what a row has read is of use only to rows with the same one."""
        return self.held.key if self.held else None

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.tokens

    @property
    def usage(self) -> Usage:
        asked, begun = len(self.prompt) - self.request.begun, self.request.begun
        return Usage(asked, min(self.cached, asked), begun + len(self.drawn))

    def tell(self, piece: Piece) -> None:
        """Hands a piece to whoever asked."""
        self.listener(piece)


@dataclasses.dataclass(eq=False)
class Slot:
    """A row of the batch.

    Attributes:
        fed: how many tokens its cache holds.
        held: these tokens, as left by the last request (or copied); a running one has its own.
        used: when it was last given away.
    """

    number: int
    job: Job | None = None
    adapter: str | None = None
    fed: int = 0
    held: list[int] = dataclasses.field(default_factory=list)
    used: int = 0

    @property
    def known(self) -> Sequence[int]:
        """The tokens in the cache, as far as the host has seen them."""
        return self.held if self.job is None else [*self.job.prompt, *self.job.drawn][: self.fed]

    @property
    def unread(self) -> int:
        """How many tokens of the prompt have to be read before a step: all but the last, which the step takes."""
        return 0 if self.job is None else max(0, len(self.job.prompt) - 1 - self.fed)


class Slots:
    """All rows of the batch.

    Args:
        whole: whether a row's state cannot be cut short (recurrences): what it holds is of use only as a whole.
    """

    def __init__(self, count: int, *, whole: bool = False) -> None:
        self.all = [Slot(number) for number in range(count)]
        self._whole, self._clock, self._turns = whole, 0, 0

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.all)

    @property
    def free(self) -> list[Slot]:
        return [slot for slot in self.all if slot.job is None]

    @property
    def decoding(self) -> list[Slot]:
        """Those whose prompts are read and who may draw one more token."""
        return [slot for slot in self.all if _may_draw(slot)]

    @property
    def reading(self) -> list[Slot]:
        """Those with a prompt to read, the oldest request first."""
        return sorted((slot for slot in self.all if slot.unread), key=lambda slot: slot.used)

    def place(self, job: Job) -> Slot | None:
        """The slot that the job now has, with as much of its prompt as was there already; None if all are taken."""
        if not self.free:
            return None

        def value(slot: Slot) -> tuple[bool, int, int]:
            shared = self.shared(slot, job)
            # What another chat may go on from is left to it.
            continues = shared >= WORTH > slot.fed - shared
            return continues, shared if continues else 0, -slot.used

        slot = max(self.free, key=value)
        slot.fed, slot.adapter = self.shared(slot, job), job.adapter
        slot.job, slot.held = job, []
        self._clock += 1
        slot.used = self._clock
        job.cached = slot.fed
        return slot

    def release(self, slot: Slot) -> None:
        """Frees a slot; what it has read stays for others to go on from."""
        job, slot.job = slot.job, None
        tokens = [*job.prompt, *job.drawn]
        # A step under way writes a token that nobody will know: in attention's cache it is not in the way.
        slot.held = [] if self._whole and slot.fed > len(tokens) else tokens[: slot.fed]
        slot.fed = len(slot.held)

    def cut(self, size: int) -> None:
        """Notes that caches have room for only `size` tokens now."""
        for slot in self.free:
            slot.held = slot.held[:size] if not self._whole or slot.fed <= size else []
            slot.fed = len(slot.held)

    def shared(self, slot: Slot, job: Job) -> int:
        """How many tokens of the job's prompt the slot's cache holds in the right places, the last never counted."""
        if slot.adapter != job.adapter or not slot.fed:
            return 0
        known = slot.known
        found = common(known, job.prompt[:-1])
        return 0 if self._whole and not found == len(known) == slot.fed else found

    def source(self, slot: Slot) -> tuple[Slot, int] | None:
        """Another slot that holds more of this one's prompt, and how much; None if copying it is not worth it."""
        others = [(self.shared(other, slot.job), other) for other in self.all if other is not slot]
        most, other = max(others, key=lambda pair: pair[0], default=(0, None))
        return (other, most) if most - slot.fed >= WORTH else None

    def next_readers(self) -> list[Slot]:
        """The slots that should read, the first one first; those that wait for another to read for them left out.

        The shortest go first, so that a long prompt does not hold the others up, but every other place is that of the
        oldest.
        """
        reading = self.reading
        ahead = [slot for slot in reading if not any(self._waits(slot, other) for other in reading)]
        shortest = sorted(ahead, key=lambda slot: slot.unread)
        self._turns += 1
        pairs = zip(shortest, ahead, strict=True) if self._turns % 2 else zip(ahead, shortest, strict=True)
        return list(dict.fromkeys(slot for pair in pairs for slot in pair))

    def _waits(self, slot: Slot, other: Slot) -> bool:
        """Whether the older slot `other` is about to read what this one needs."""
        if self._whole or other.used >= slot.used or other.adapter != slot.adapter:
            return False
        return common(other.job.prompt[:-1], slot.job.prompt[:-1]) - max(slot.fed, other.fed) >= WORTH


def common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many tokens two lists begin with alike, or how many characters two texts."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if list(first[low:middle]) == list(second[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


def _may_draw(slot: Slot) -> bool:
    job = slot.job
    return job is not None and not slot.unread and job.steps < job.request.max_new_tokens
