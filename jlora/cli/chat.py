"""`jlora chat`: a conversation in a terminal."""

import argparse
import contextlib
import dataclasses
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jlora import allocator, data, hub
from jlora.cli.model import load_model
from jlora.cli.parsers.chat import BASE, HELP, Settings
from jlora.errors import Failed, UserError
from jlora.lora import Bank
from jlora.serve import Engine, Limits, Piece, Request, Sampling
from jlora.types import Params

# A terminal obeys control characters, and a model writes what it likes: they are shown as such.
HIDDEN = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def run(options: argparse.Namespace) -> int:
    """Runs the command until the input ends or /quit, and returns 0; mistakes and failures raise."""
    settings = changed(
        Settings(), [f"{name}={value}" for name in NAMES if (value := getattr(options, name)) is not None]
    )
    allocator.keep_freed_pages()
    start = time.perf_counter()
    model, params, tokenizer = load_model(options)
    if not tokenizer.chat_template:
        raise UserError(f"{options.model}: its tokenizer has no chat template; `jlora generate` continues texts")
    params, names = _adapted(params, options.adapter, options.model)
    engine = Engine(model, params, tokenizer, Limits(rows=1, length=options.length, queue=1, chunk=128))
    engine.start()
    chat = Chat(engine, tokenizer, names, settings, options.system)
    chat.say(f"ready after {time.perf_counter() - start:.1f} s; /help tells what can be said", dim=True)
    try:
        for line in _lines(lambda: chat.prompt):
            if not chat.hear(line):
                break
    finally:
        engine.stop(drain=False)
    return 0


def _adapted(params: Params, folders: list[str], base: str) -> tuple[Params | Bank, dict[str, str | None]]:
    """The params or a bank, and the names that adapters are called by: the folders' last parts, if these differ."""
    if not folders:
        return params, {}
    short = [Path(folder).name for folder in folders]
    names = short if len(set(short)) == len(short) else folders
    if len(folders) == 1:
        adapted = hub.load_adapter(params, folders[0], base)
        with contextlib.suppress(UserError):  # what a bank cannot hold is used by itself
            return Bank.of(params, {names[0]: adapted}), {names[0]: names[0], BASE: None}
        return adapted, {names[0]: None}
    adapters = {name: hub.load_adapter(params, folder, base) for name, folder in zip(names, folders, strict=True)}
    return Bank.of(params, adapters), {name: name for name in names} | {BASE: None}


def changed(settings: Settings, words: list[str]) -> Settings:
    """The settings after NAME=VALUE words.

    Raises:
        UserError: a word is not a setting with a valid value; all faults are listed.
    """
    found, faults = {}, []
    for word in words:
        name, _, text = word.partition("=")
        try:
            found[name] = NAMES[name](text)
        except KeyError:
            faults.append(f"{word}: expected NAME=VALUE with one of {', '.join(NAMES)}")
        except ValueError:
            faults.append(f"{word}: expected a number")
    if faults:
        raise UserError("\n".join(faults))
    settings = dataclasses.replace(settings, **found)
    _request(settings, [0], None).check(1 << 62)
    return settings


def _request(settings: Settings, tokens: list[int], adapter: str | None, *, room: int | None = None) -> Request:
    """A request with these settings, for as many tokens as there is room for."""
    values = dataclasses.asdict(settings)
    seed, new = values.pop("seed"), values.pop("max_new_tokens")
    seed = time.time_ns() if seed is None else seed
    return Request(tokens, new if room is None else min(new, room), adapter, Sampling(**values), seed=seed)


def _seed(text: str) -> int | None:
    return None if text in ("", "None") else int(text)


NAMES: dict[str, Callable[[str], Any]] = {
    field.name: _seed if field.name == "seed" else type(field.default) for field in dataclasses.fields(Settings)
}


class Chat:
    """A conversation and what it is held with."""

    def __init__(
        self, engine: Engine, tokenizer: Any, adapters: dict[str, str | None], settings: Settings, system: str | None
    ) -> None:
        self._engine, self._tokenizer, self._adapters = engine, tokenizer, adapters
        self._adapter = next(iter(adapters), BASE)
        self._settings, self._system = settings, system
        self._messages: list[dict[str, str]] = []
        self._is_terminal = sys.stdout.isatty()
        self._is_styled = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    @property
    def prompt(self) -> str:
        """What stands before the user's words."""
        return f"{self._adapter}> " if self._adapters else "> "

    def hear(self, line: str) -> bool:
        """Answers a line, or does what it says; False after /quit."""
        word, _, rest = line.strip().partition(" ")
        acts = {
            "/adapter": self.switch,
            "/system": self.tell,
            "/set": self.set,
            "/undo": self.undo,
            "/reset": self.reset,
            "/help": self.help,
        }
        try:
            if word == "/quit":
                return False
            if word in acts:
                acts[word](rest.strip())
            elif word.startswith("/"):
                raise UserError(f"{word} is not one of {', '.join(acts)}, /quit")
            elif word:
                self.answer(line)
        except (UserError, Failed) as error:
            self.say(str(error))
        return True

    def switch(self, name: str) -> None:
        if not name:
            self.say(f"adapters: {', '.join(self._adapters) or 'none'}; in use: {self._adapter}")
        elif name not in self._adapters:
            raise UserError(f"no adapter is called {name!r}: there are {', '.join(self._adapters) or 'none'}")
        else:
            self._adapter = name

    def tell(self, text: str) -> None:
        self._system = text or None
        self.say(f"system text: {text or 'none'}", dim=True)

    def set(self, words: str) -> None:
        self._settings = changed(self._settings, words.split())
        self.say(str(self._settings), dim=True)

    def undo(self, _: str) -> None:
        if not self._messages:
            raise UserError("nothing has been said that could be taken back")
        *self._messages, last, _ = self._messages
        self.say(f"taken back: {last['content']}", dim=True)

    def reset(self, _: str) -> None:
        self._messages = []
        self.say("the conversation starts over", dim=True)

    def help(self, _: str) -> None:
        self.say(HELP)

    def answer(self, text: str) -> None:
        """Prints what the model answers, as it comes; an answer that Ctrl-C ends is a part of the conversation too."""
        asked = [*self._messages, {"role": "user", "content": text}]
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        tokens = data.encode_prompt([*system, *asked], self._tokenizer)
        room = self._engine.length - len(tokens)
        if room < 1:
            raise UserError(
                f"the conversation has {len(tokens)} tokens, of {self._engine.length} that there is room for: /undo "
                "takes back what was said last, /reset starts over"
            )
        start, first, said = time.perf_counter(), None, ""
        request = _request(self._settings, tokens, self._adapters.get(self._adapter), room=room)
        for piece in self._pieces(request):
            first = first or time.perf_counter()
            said += piece.text
            print(piece.text.translate(HIDDEN) if self._is_terminal else piece.text, end="", flush=True)
            if piece.error:
                raise Failed(piece.error)
        print()
        self._messages = [*asked, {"role": "assistant", "content": said}]
        if self._is_terminal and piece.usage:
            took = max(time.perf_counter() - first, 1e-9)
            rate = f", then {(piece.usage.completion - 1) / took:.0f} tokens/s" if piece.usage.completion > 1 else ""
            known = f"; {piece.usage.cached} of {piece.usage.prompt} tokens were known" if piece.usage.cached else ""
            cut = (
                "; cut off: there was no room for more"
                if request.max_new_tokens == room
                else "; cut off by max_new_tokens"
            )
            cut = cut if piece.finish == "length" else ""
            self.say(f"first token after {first - start:.2f} s{rate}{known}{cut}", dim=True)

    def _pieces(self, request: Request) -> Iterator[Piece]:
        heard: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        job = self._engine.submit(request, heard.put)
        with _interrupt(lambda: self._engine.cancel(job)):
            while True:
                piece = heard.get()
                yield piece
                if piece.finish:
                    return

    def say(self, text: str, *, dim: bool = False) -> None:
        """Prints what is not the model's: to standard error if the output goes elsewhere."""
        if self._is_terminal:
            print(f"\033[2m{text}\033[0m" if dim and self._is_styled else text, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C does this, and raises nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(prompt: Callable[[], str]) -> Iterator[str]:
    """The user's lines, with line editing where there is a terminal."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (`input` edits lines and remembers them once it is imported)
    parts: list[str] = []
    while True:
        try:
            line = input(("… " if parts else prompt()) if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the conversation")
            parts = []
            continue
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []
