"""A folder of adapters, each of which is a model's name: what is there is served, as it comes and goes."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from jlora import hub, lora
from jlora.errors import MissingFileError, UserError
from jlora.hub.peft.config import CONFIG
from jlora.lora import Bank
from jlora.serve.engine import Engine
from jlora.types import Params

Signature = tuple[tuple[str, int, int], ...]


class Folder:
    """The adapters of a folder in an engine.

    Args:
        source: where the base is from, for a note if an adapter was trained on another.
        taken: names that no adapter may have.
        note: called with what happened, a line at a time.
    """

    def __init__(
        self, path: Path, engine: Engine, *, source: str, taken: tuple[str, ...], note: Callable[[str], None]
    ) -> None:
        self.path, self._engine, self._source, self._taken = path, engine, source, taken
        self._note, self._lock, self._stopped = note, threading.Lock(), threading.Event()
        # What was last seen of each subfolder, and what was last done about it.
        self._seen: dict[str, Signature] = {}
        self._done = {name: signature for name, signature in subfolders(path).items() if name in engine.adapters}

    def load(self, name: str, path: str) -> None:
        """Adds or replaces an adapter.

        Args:
            path: absolute, or within the folder.

        Raises:
            UserError: the path leaves the folder, or the adapter cannot be used; all is as before.
        """
        if fault := self._name_fault(name):
            raise UserError(fault)
        root, found = self.path.resolve(), (self.path / path).resolve()
        if not found.is_relative_to(root):
            raise UserError(f"lora_path: {path!r} leaves the folder of adapters")
        if not (found / CONFIG).is_file():
            raise UserError(f"lora_path: {path!r} holds no {CONFIG}")
        with self._lock:
            self._put(name, found)

    def unload(self, name: str) -> None:
        """Removes an adapter; it comes back when its subfolder changes.

        Raises:
            UnknownNameError: there is none of this name.
        """
        with self._lock:
            self._engine.remove_adapter(name).result()

    def scan(self) -> None:
        """Does what subfolders that came, changed or went ask for.

        One that changes is left alone until it is the same twice: it may still be written.
        """
        with self._lock:
            there, before = subfolders(self.path), self._seen
            self._seen = there
            for name, signature in there.items():
                if signature == before.get(name) and signature != self._done.get(name):
                    self._done[name] = signature
                    self._try(name, lambda name=name: self._put(name, self.path / name), "added")
            for name in [name for name in self._done if name not in there]:
                del self._done[name]
                if name in self._engine.adapters:
                    self._try(name, lambda name=name: self._engine.remove_adapter(name).result(), "removed")

    def watch(self, seconds: float) -> None:
        """Scans every so many seconds, in a thread, until `stop`."""

        def run() -> None:
            while not self._stopped.wait(seconds):
                self.scan()

        threading.Thread(target=run, name="jlora adapters", daemon=True).start()

    def stop(self) -> None:
        """Ends `watch`."""
        self._stopped.set()

    def _put(self, name: str, path: Path) -> None:
        if fault := self._name_fault(name):
            raise UserError(fault)
        params = hub.load_adapter(self._engine.base, path, self._source)
        self._engine.put_adapter(name, params).result()

    def _try(self, name: str, act: Callable[[], None], done: str) -> None:
        try:
            act()
            self._note(f"adapter {name}: {done}")
        except (UserError, OSError) as error:
            self._note(f"adapter {name}: not {done}: {error}")

    def _name_fault(self, name: str) -> str:
        if name in self._taken:
            return f"lora_name: {name!r} is the base's name"
        return "" if name and name == name.strip() and "/" not in name else f"lora_name: {name!r} cannot be a name"


def subfolders(path: Path) -> dict[str, Signature]:
    """The subfolders that hold an adapter, each with the sizes and times of its files."""
    found = {}
    for folder in sorted(path.iterdir()) if path.is_dir() else ():
        try:
            if (folder / CONFIG).is_file():
                files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
                found[folder.name] = tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in files)
        except OSError:  # it is being removed
            continue
    return found


def opened(
    params: Params, path: Path, source: str, *, taken: tuple[str, ...], note: Callable[[str], None]
) -> dict[str, Params]:
    """The adapters of a folder's subfolders, those left out that cannot be opened or have a name that is taken.

    Raises:
        MissingFileError: there is no such folder.
    """
    if not path.is_dir():
        raise MissingFileError(f"--adapters: no folder {path}")
    found = {}
    for name in subfolders(path):
        if name in taken:
            note(f"adapter {name}: not added: it is the base's name")
            continue
        try:
            found[name] = lora.adapter_leaves(hub.load_adapter(params, path / name, source))
        except (UserError, OSError) as error:
            note(f"adapter {name}: not added: {error}")
    return found


def bank(
    params: Params,
    adapters: Mapping[str, Params],
    *,
    places: int,
    config: lora.LoraConfig | None,
    note: Callable[[str], None],
    dtype: str = "float32",
) -> Bank:
    """A bank of those adapters that one can hold.

    Args:
        config: the modules and rank to make room for besides those of the adapters; if there are none and it is None,
            rank 16 on all linears.
        dtype: of the adapters' factors.
    """
    fit: dict[str, Params] = {}
    for name, adapter in adapters.items():
        try:
            Bank.of(params, {name: adapter})
            fit[name] = adapter
        except UserError as error:
            note(f"adapter {name}: not added: {error}")
    for name in list(fit)[places:]:
        note(f"adapter {name}: not added: all {places} places are taken")
    kept = dict(list(fit.items())[:places])
    if config is None and not kept:
        config = lora.LoraConfig(r=16, target_modules="all-linear")
    return Bank.of(params, kept, places=places, config=config, dtype=dtype)
