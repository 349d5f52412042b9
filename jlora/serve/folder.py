"""A folder of adapters, each of which is a model's name: what is there is served, as it comes and goes."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from jlora import hub, lora
from jlora.errors import MissingFileError, UserError
from jlora.families.kinds import short
from jlora.hub.peft.config import CONFIG
from jlora.lora import Bank
from jlora.serve.engine import Engine
from jlora.serve.shelf import NoPlace
from jlora.types import Params

LONGEST = 255  # characters of a name
Signature = tuple[tuple[str, int, int], ...]


class Folder:
    """The adapters of a folder in an engine.

    Args:
        source: where the base is from, for a note if an adapter was trained on another.
        taken: names that no adapter may have.
        note: called with what happened, a line at a time.
        done: the subfolders that need nothing until they change: those whose adapters the engine was started with, and
            those of which `note` was told why not.
    """

    def __init__(
        self,
        path: Path,
        engine: Engine,
        *,
        source: str,
        taken: tuple[str, ...],
        note: Callable[[str], None],
        done: Mapping[str, Signature],
    ) -> None:
        self.path, self._engine, self._source, self._taken = path, engine, source, taken
        self._note, self._lock, self._stopped = note, threading.Lock(), threading.Event()
        # What was last seen of each subfolder, what was last done about it, and what waits to be done.
        self._seen: dict[str, Signature] = {}
        self._done, self._waits = dict(done), {}

    def load(self, name: str, path: str) -> None:
        """Adds or replaces an adapter.

        Args:
            path: absolute, or within the folder.

        Raises:
            UserError: the path leaves the folder, or the adapter cannot be used; all is as before.
        """
        if fault := self._name_fault(name):
            raise UserError(fault)
        try:
            root, found = self.path.resolve(), (self.path / path).resolve()
            holds_one = (found / CONFIG).is_file()
        except (OSError, ValueError) as error:
            raise UserError(f"lora_path: {short(path)} cannot be a path: {error}") from error
        if not found.is_relative_to(root):
            raise UserError(f"lora_path: {short(path)} leaves the folder of adapters")
        if not holds_one:
            raise UserError(f"lora_path: {short(path)} holds no {CONFIG}")
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

        One that changes or goes is left alone until it is the same twice: it may still be written, or be replaced.
        """
        with self._lock:
            there, before = subfolders(self.path), self._seen
            self._seen = there
            for name, signature in there.items():
                if signature == before.get(name) and signature != self._done.get(name):
                    self._add(name, signature)
            for name in [name for name in self._done if name not in there and name not in before]:
                del self._done[name]
                if name in self._engine.adapters:
                    self._try(name, "removed", lambda name=name: self._engine.remove_adapter(name).result())

    def watch(self, seconds: float) -> None:
        """Scans every so many seconds, in a thread, until `stop`."""

        def run() -> None:
            said = ""
            while not self._stopped.wait(seconds):
                try:
                    self.scan()
                    fault = ""
                except OSError as error:  # too many open files, a disk that is away for a while
                    fault = f"adapters: {self.path} cannot be read, what was there is served: {error}"
                if fault and fault != said:
                    self._note(fault)
                said = fault

        threading.Thread(target=run, name="jlora adapters", daemon=True).start()

    def stop(self) -> None:
        """Ends `watch`."""
        self._stopped.set()

    def _put(self, name: str, path: Path) -> None:
        if fault := self._name_fault(name):
            raise UserError(fault)
        self._engine.require_place(name)
        try:
            params = hub.load_adapter(self._engine.base, path, self._source)
        except OSError as error:
            raise error if isinstance(error, UserError) else UserError(f"{path} cannot be read: {error}") from error
        self._engine.put_adapter(name, params).result()

    def _add(self, name: str, signature: Signature) -> None:
        """Puts a subfolder's adapter; if there is no place, at each scan until there is one."""
        try:
            self._try(name, "added", lambda: self._put(name, self.path / name))
        except NoPlace as error:
            if self._waits.get(name) != signature:
                self._waits[name] = signature
                self._note(f"adapter {name}: not added yet: {error}")
        else:
            self._done[name] = signature

    def _try(self, name: str, done: str, act: Callable[[], None]) -> None:
        try:
            act()
        except NoPlace:
            raise
        except Exception as error:  # noqa: BLE001 (one adapter's trouble must not end the watch over the others)
            self._note(f"adapter {name}: not {done}: {_fault(error)}")
        else:
            self._note(f"adapter {name}: {done}")

    def _name_fault(self, name: str) -> str:
        if name in self._taken:
            return f"lora_name: {name!r} is the base's name"
        fits = 0 < len(name) <= LONGEST and name.isprintable() and name == name.strip() and "/" not in name
        return "" if fits else f"lora_name: {short(name)} cannot be a name"


def subfolders(path: Path) -> dict[str, Signature]:
    """The subfolders that hold an adapter, each with the sizes and times of its files.

    Hidden ones are left out: `jlora.save_adapter`, rsync and others write under such a name until all is there.
    """
    found = {}
    for folder in sorted(path.iterdir()) if path.is_dir() else ():
        if folder.name.startswith("."):
            continue
        try:
            if (folder / CONFIG).is_file():
                files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
                found[folder.name] = tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in files)
        except FileNotFoundError:  # it is being removed
            continue
        except OSError:  # it is there, and whoever opens it will hear why it cannot be read
            found[folder.name] = ()
    return found


def opened(
    params: Params, path: Path, source: str, *, taken: tuple[str, ...], note: Callable[[str], None]
) -> dict[str, Params]:
    """The adapters of a folder's subfolders that a bank can hold; of the others, `note` is told why not.

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
            adapter = lora.adapter_leaves(hub.load_adapter(params, path / name, source))
            Bank.of(params, {name: adapter})
            found[name] = adapter
        except Exception as error:  # noqa: BLE001 (nor keep them from being served)
            note(f"adapter {name}: not added: {_fault(error)}")
    return found


def bank(
    params: Params,
    adapters: Mapping[str, Params],
    *,
    places: int,
    config: lora.LoraConfig | None,
    dtype: str = "float32",
) -> Bank:
    """A bank of the first of these adapters, as many as there are places.

    Args:
        config: the modules and rank to make room for besides those of the adapters; if there are none and it is None,
            rank 16 on all linears.
        dtype: of the adapters' factors.
    """
    kept = dict(list(adapters.items())[:places])
    if config is None and not kept:
        config = lora.LoraConfig(r=16, target_modules="all-linear")
    return Bank.of(params, kept, places=places, config=config, dtype=dtype)


def _fault(error: Exception) -> str:
    """What went wrong; errors that are not meant for users are told with their type."""
    return str(error) if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error}"
