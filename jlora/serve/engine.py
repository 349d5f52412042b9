"""The engine: requests come and go while one batch runs, a step at a time."""

import collections
import copy
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import data, lora, quant
from jlora.errors import UserError, number_of
from jlora.lora import Bank
from jlora.models import Model
from jlora.models.mixers import MIXERS
from jlora.models.rope import LENGTH_DEPENDENT
from jlora.serve.programs import Programs, idle, nothing
from jlora.serve.request import SEEDS, Busy, Listener, Piece, Request, Stopping, Token
from jlora.serve.rows import Drawn
from jlora.serve.shelf import Shelf
from jlora.serve.slots import Job, Slot, Slots
from jlora.serve.words import Words
from jlora.types import Params

SMALLEST = 128  # places of the smallest cache
NARROW, SEVERAL = 32, 4  # tokens of the smallest piece of a prompt, and rows that are read together
PATIENCE = 64  # steps that a cache is too large before it shrinks
READS = 4  # pieces that are read in a row while fewer rows draw than wait
REST = 10.0  # seconds that a program which is not needed yet waits for a moment without requests
COLD = 1e-5  # below this temperature only the likeliest token is drawn, and logits would overflow
TROUBLES = 3  # failed turns in a row after which the engine gives up


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine makes room for.

    Attributes:
        rows: how many requests run at a time.
        length: the most tokens of a prompt with its answer; None: what the model was made for, at most 8192.
        queue: how many more may wait.
        chunk: the most tokens of a prompt that are read between two steps.
    """

    rows: int = 16
    length: int | None = None
    queue: int = 256
    chunk: int = 128

    def __post_init__(self) -> None:
        least = {"rows": 1, "length": 2, "queue": 0, "chunk": 1}
        wrong = [
            f"{name}={value}: expected {least[name]} or more"
            for name, value in dataclasses.asdict(self).items()
            if value is not None and value < least[name]
        ]
        if wrong:
            raise UserError("\n".join(wrong))


class Numbers(collections.Counter):
    """What the engine has done: requests by how they ended, tokens read, found and drawn, steps, pieces."""


class Launched(NamedTuple):
    """A step under way: whose tokens it draws, and what it will give."""

    jobs: list[tuple[Slot, Job]]
    drawn: Drawn
    told: bool


class Engine:
    """Requests in, pieces of answers out, for as long as it runs.

    A request's answer depends on the request and its adapter alone, not on what else is in the batch. All methods may
    be called from any thread; listeners are called in the engine's own, and must not wait.

    Args:
        params: the model's, with or without an adapter, or a bank, which the engine then owns.
        tokenizer: makes texts of the tokens.
        note: called, in the engine's thread, with what failed besides the requests that are told of it.
    """

    def __init__(
        self,
        model: Model,
        params: Params | Bank,
        tokenizer: Any,
        limits: Limits = Limits(),
        *,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.limits, self._note = model, limits, note
        self.length = longest(model, limits.length)
        self.numbers, self.failure = Numbers(), None
        if isinstance(params, Bank):
            params = dataclasses.replace(params, params=quant.with_scales(params.params))
        else:
            params = quant.with_scales(params)
        self._bank = params if isinstance(params, Bank) else None
        self._alone = None if self._bank else params
        self.shelf = Shelf(self._bank)
        self.tokenizer = copy.deepcopy(data.unfitted(tokenizer))  # others may use theirs in other threads
        self._ends = data.stop_ids(tokenizer, model.config.eos_token_ids, model.config.vocab_size)
        self._slots = Slots(limits.rows, whole=_is_recurrent(model))
        self.programs = Programs(
            model,
            self._params,
            limits.rows,
            banked=self._bank is not None,
            sizes=_sizes(self.length),
            shapes=_shapes(limits),
        )
        self._size, self._rows, self._slack = 0, None, 0
        self._waiting: collections.deque[Job] = collections.deque()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._launched: Launched | None = None
        self._threads: list[threading.Thread] = []
        self._lock, self._reads, self._troubles = threading.Lock(), 0, 0
        self._open, self._ended, self._taken = True, False, 0

    # ---------------------------------------------------------------- from any thread

    def submit(self, request: Request, listener: Listener) -> Job:
        """The request on its way; the listener is called with the pieces of its answer.

        Raises:
            UserError: the request cannot be answered, or there is no such adapter.
            Busy: too many wait.
            Stopping: the engine takes no more.
        """
        request.check(self.length)
        if fault := self.model.without_row([request.tokens]):
            raise UserError(f"the prompt: {fault}")
        with self._lock:
            held = self.shelf.get(request.adapter)
            if not self._open:
                raise Stopping("the engine is stopping, and takes no more requests")
            if self._taken >= self.limits.rows + self.limits.queue:
                raise Busy(
                    f"{number_of(self._taken, 'request')} running or waiting, which is all that there is room for"
                )
            self._taken += 1
            self.shelf.take(held)
            begun = request.tokens[len(request.tokens) - request.begun :]
            words = Words(self.tokenizer, request.stop, request.kept, begun)
            job = Job(request, listener, words, held, self.shelf.place(held))
        self._orders.put(lambda: self._waiting.append(job))
        return job

    def cancel(self, job: Job) -> None:
        """Ends a request early, if it has not ended; its row is free at the next step."""
        self._orders.put(lambda: self._end(job, "cancelled"))

    def put_adapter(self, name: str, adapter: Params) -> "Future[None]":
        """Adds an adapter or replaces the one of this name, between two steps. Requests that came before keep theirs.

        The result raises UserError if it does not fit.
        """
        return self._order(lambda: self._change(lambda: self.shelf.put(name, adapter)))

    def require_place(self, name: str) -> None:
        """Raises NoPlace if `put_adapter` has none for an adapter of this name now."""
        with self._lock:
            self.shelf.require_place(name)

    def remove_adapter(self, name: str) -> "Future[None]":
        """Removes an adapter, between two steps. Requests that came before keep it.

        The result raises UnknownNameError if there is none.
        """
        return self._order(lambda: self._change(lambda: self.shelf.remove(name)))

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return self._open

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters."""
        with self._lock:
            return self.shelf.names

    @property
    def base(self) -> Params:
        """The params without adapters."""
        return lora.strip(self._params)

    @property
    def load(self) -> dict[str, int]:
        """How many requests run and wait, and the size of the cache."""
        running = len(self._slots.all) - len(self._slots.free)
        return {"running": running, "waiting": max(0, self._taken - running), "cache_tokens": self._size}

    def start(self) -> None:
        """Runs in a thread of its own, until `stop`.

        What the smallest cache needs is compiled before; what larger ones need, preferably while none are answered.
        """
        self.programs.warm(self.programs.sizes[:1])
        self.shelf.warm()
        warm = functools.partial(self.programs.warm, before=self._rest)
        for name, work in (("jlora engine", self._run), ("jlora programs", warm)):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def _rest(self) -> None:
        """Waits until nothing is asked, but not for long: compiling takes the cores that an answer wants."""
        most = time.monotonic() + REST
        while self._taken and self._open and time.monotonic() < most:
            time.sleep(0.05)

    def close(self) -> None:
        """Takes no more requests; those that it has are answered."""
        self._open = False

    def cut(self) -> None:
        """Takes no more requests, and cancels those that it has."""
        self.close()
        self._orders.put(lambda: self._end_all("cancelled", "the engine is stopping"))

    def stop(self, *, drain: bool = True) -> None:
        """Takes no more requests, answers those that it has (or cancels them), and ends the thread."""
        self.close() if drain else self.cut()
        self._orders.put(lambda: None)
        self.programs.close()
        for thread in self._threads:
            thread.join()

    # ---------------------------------------------------------------- in the engine's own

    def _run(self) -> None:
        while self._goes_on():
            if not self.turn():
                self._obey(wait=self._open)
            if self.failure:
                break
        with self._lock:
            self._ended = True
        while self._taken or not self._orders.empty():  # of those who were quicker than that
            self._obey(wait=True)
            self._end_all("error", _told(self.failure))

    def _goes_on(self) -> bool:
        with self._lock:  # one who is about to submit counts
            return self._open or self._taken > 0

    def turn(self) -> bool:
        """Does what there is to do: reads a piece of a prompt, launches a step, tells what the step before it drew.

        Returns whether there was anything.
        """
        self._obey()
        try:
            before, self._launched = self._launched, None
            is_busy = self._advance()
            if before is not None:
                self._collect(before)
            self._troubles = 0
        except Exception as error:  # noqa: BLE001 (a device out of memory, a bug: those who wait must hear of it)
            self._recover(error)
            return True
        return is_busy or before is not None

    def _advance(self) -> bool:
        self._admit()
        readers, decoding = self._slots.next_readers(), self._slots.decoding
        if readers:
            self._read(readers)
            self._reads += 1
        # A step costs the same for few rows as for many.
        if decoding and (not readers or self._reads >= READS or len(decoding) >= len(self._slots.reading)):
            self._launched, self._reads = self._step(self._slots.decoding), 0
        return bool(readers or decoding)

    def _obey(self, *, wait: bool = False) -> None:
        """Does what other threads ordered."""
        if wait:
            self._orders.get()()
        while not self._orders.empty():
            self._orders.get()()

    def _order(self, act: Callable[[], None]) -> "Future[None]":
        """What becomes of something that the engine's own thread is to do.

        Raises:
            Stopping: that thread has ended.
        """
        found: Future[None] = Future()

        def obey() -> None:
            try:
                found.set_result(act())
            except Exception as error:  # noqa: BLE001 (whoever ordered it hears of it)
                found.set_exception(error)

        with self._lock:
            if self._ended:
                raise Stopping("the engine has ended")
            self._orders.put(obey)
        return found

    def _change(self, act: Callable[[], None]) -> None:
        with self._lock:
            act()

    @property
    def _params(self) -> Params:
        return self._alone if self.shelf.bank is None else self.shelf.bank.params

    def _admit(self) -> None:
        while self._waiting and (slot := self._slots.place(self._waiting[0])):
            job = self._waiting.popleft()
            if job.request.sampling.penalizes:
                self._fit(1)
                found = np.zeros(self.model.config.vocab_size, bool)
                found[np.asarray(job.prompt)] = True
                self._rows = self.programs.begin(self._size)(self._rows, np.int32(slot.number), found)

    def _read(self, readers: Sequence[Slot]) -> None:
        """Reads a piece of the first of the prompts, or of several at once."""
        for slot in readers:
            self._share(slot)
        if not (readers := [slot for slot in readers if slot.unread]):
            return
        shape = self._shape(readers)
        readers = readers[: shape[0]]
        self._fit(max(min(slot.fed + shape[1], len(slot.job.prompt)) for slot in readers))
        which, tokens, starts, counts, places = nothing(*shape, banked=self._bank is not None)
        which[:] = len(self._slots.all)
        for row, slot in enumerate(readers):
            piece = slot.job.prompt[slot.fed : slot.fed + min(slot.unread, shape[1])]
            which[row], starts[row], counts[row] = slot.number, slot.fed, len(piece)
            tokens[row, : len(piece)] = piece
            if places is not None:
                places[row] = slot.job.place
            slot.fed += len(piece)
        self.numbers["prompt_tokens_read"] += int(counts.sum())
        self.numbers["pieces"] += 1
        self._rows = self.programs.read(self._size, shape)(
            self._params, self._rows, which, tokens, starts, counts, places
        )

    def _shape(self, readers: Sequence[Slot]) -> tuple[int, int]:
        """The shape of the next piece: of several rows if as many wait, or as wide as the first one needs."""
        shapes = self.programs.shapes
        if several := [shape for shape in shapes if 1 < shape[0] <= len(readers) + 1]:
            return several[0]
        single = sorted(shape for shape in shapes if shape[0] == 1)
        # Two narrow pieces cost less than a wide one that is mostly padding.
        return next((shape for shape in single if 2 * shape[1] >= readers[0].unread), single[-1])

    def _share(self, slot: Slot) -> None:
        """Copies what another row has read of the same prompt."""
        if found := self._slots.source(slot):
            other, count = found
            self._rows = self.programs.copy(self._size)(self._rows, np.int32(other.number), np.int32(slot.number))
            slot.job.cached += count - slot.fed
            slot.fed = count

    def _step(self, slots: Sequence[Slot]) -> Launched:
        self._fit(max(slot.fed for slot in slots) + 1)
        turn = idle(len(self._slots.all), banked=self._bank is not None)
        told = any(slot.job.request.top is not None for slot in slots)
        turn = turn._replace(told=np.array(told))
        for slot in slots:
            _fill(turn, slot)
            slot.fed += 1
            slot.job.steps += 1
        self._rows, drawn = self.programs.step(self._size)(self._params, self._rows, turn)
        self.numbers["steps"] += 1
        return Launched([(slot, slot.job) for slot in slots], drawn, told)

    def _collect(self, launched: Launched) -> None:
        """Tells what a step drew."""
        drawn = launched.drawn if launched.told else launched.drawn.tokens
        found = jax.device_get(drawn)
        numbers = found.tokens if launched.told else found
        for slot, job in launched.jobs:
            if job.finish is None:
                self.numbers["tokens_drawn"] += 1
                self._tell(job, int(numbers[slot.number]), found if launched.told else None, slot.number)

    def _tell(self, job: Job, number: int, drawn: Drawn | None, row: int) -> None:
        request = job.request
        job.drawn.append(number)
        if number in request.stop_ids or (number in self._ends and not request.ignore_end):
            self._end(job, "stop")
            return
        text = job.words.add(number)
        token = (_token(number, drawn, row, request.top),)
        if job.words.stopped:
            self._end(job, "stop", text, token)
        elif len(job.drawn) == request.max_new_tokens:
            self._end(job, "length", text, token)
        else:
            job.tell(Piece(text, token))

    def _end(
        self, job: Job, finish: str, text: str = "", tokens: tuple[Token, ...] = (), error: str | None = None
    ) -> None:
        """Ends a request, and frees its row."""
        if job.finish is not None:
            return
        text += "" if job.words.stopped else job.words.end()
        if job.words.stopped and finish == "length":
            finish = "stop"
        job.finish = finish
        slot = next((slot for slot in self._slots if slot.job is job), None)
        if slot is not None:
            self._slots.release(slot)
        else:
            self._waiting.remove(job)
        with self._lock:
            self._taken -= 1
            self.shelf.give_back(job.held)
        self.numbers[f"ended_{finish}"] += 1
        self.numbers["prompt_tokens"] += len(job.prompt)
        self.numbers["prompt_tokens_cached"] += job.cached
        job.tell(Piece(text, tokens, finish, job.usage, error))

    def _end_all(self, finish: str, error: str) -> None:
        for job in [*(slot.job for slot in self._slots if slot.job), *self._waiting]:
            self._end(job, finish, error=error)

    def _fit(self, tokens: int) -> None:
        """Gives the cache room for this many tokens a row, and takes away what has not been needed for long."""
        sizes = self.programs.sizes
        busy = [slot.fed + 1 for slot in self._slots if slot.job is not None]
        needed = next(size for size in sizes if size >= max([tokens, *busy]))
        self._slack = self._slack + 1 if needed < self._size else 0
        if self._rows is None:
            self._rows, self._size = self.programs.empty(needed)(self._params), needed
        elif needed > self._size or self._slack > PATIENCE:
            self._rows = self.programs.resize(self._size, needed)(self._params, self._rows)
            self._slots.cut(needed)
            self._size, self._slack = needed, 0

    def _recover(self, error: Exception) -> None:
        """Tells all whose rows are lost, and starts with empty ones."""
        self._troubles += 1
        self._launched, self._rows, self._size = None, None, 0
        message = _told(error)
        self._note(
            f"the engine failed at what it was doing, and {number_of(self._taken, 'request')} with it: {message}"
        )
        if self._troubles >= TROUBLES:
            self.failure = error
            self.close()
            self._end_all("error", message)
        for slot in self._slots:
            if slot.job is not None:
                self._end(slot.job, "error", error=message)
            slot.held, slot.fed = [], 0


def longest(model: Model, asked: int | None) -> int:
    """The most tokens of a prompt with its answer.

    Raises:
        UserError: the model was not made for as many as are asked for.
    """
    config = model.config
    most = config.max_position_embeddings if config.names.positions else config.longest_text
    if any(rope.rope_type in LENGTH_DEPENDENT for rope in config.ropes):
        # Longer texts are rotated otherwise from their first token on, which was read before its length was known.
        most = min(most, *(rope.original_max_position_embeddings for rope in config.ropes))
    if asked is not None and asked > most:
        raise UserError(f"length {asked}: the model was made for texts of up to {most} tokens")
    return min(most, 8192) if asked is None else asked


def _is_recurrent(model: Model) -> bool:
    return any(MIXERS[layer.mixer].recurrent for layer in model.config.layers)


def _sizes(length: int) -> list[int]:
    """The sizes of the cache: each twice the one before, up to `length`."""
    found = [SMALLEST]
    while found[-1] < length:
        found.append(2 * found[-1])
    return [min(size, length) for size in found]


def _shapes(limits: Limits) -> list[tuple[int, int]]:
    """The shapes of the pieces in which prompts are read: a few tokens, many, or some of several rows."""
    widths = sorted({min(NARROW, limits.chunk), limits.chunk})
    several = [(SEVERAL, max(1, limits.chunk // 2))] if limits.rows >= SEVERAL else []
    return [*((1, width) for width in widths), *several]


def _fill(turn: Any, slot: Slot) -> None:
    """Writes what a step must know of a row."""
    row, job, request = slot.number, slot.job, slot.job.request
    turn.active[row], turn.lengths[row], turn.numbers[row] = True, slot.fed, job.steps
    turn.given[row] = -1 if job.steps else job.prompt[-1]
    turn.seeds[row], turn.choices[row] = divmod(request.seed % SEEDS, 1 << 32), request.choice
    if turn.adapters is not None:
        turn.adapters[row] = job.place
    for name, value in dataclasses.asdict(request.sampling).items():
        getattr(turn.settings, name)[row] = value
    if request.sampling.temperature < COLD:
        turn.settings.temperature[row] = 0


def _told(error: Exception | None) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _token(number: int, drawn: Drawn | None, row: int, top: int | None) -> Token:
    if drawn is None or top is None:
        return Token(number)
    pairs = zip(drawn.top_tokens[row, :top].tolist(), drawn.top_log_probs[row, :top].tolist(), strict=True)
    return Token(number, float(drawn.log_probs[row]), tuple(pairs))
