"""Encoded records that are kept on disk, so that a run with the same data, tokenizer and settings begins at once."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora import sharding
from jlora.data.chat import EncodeReport
from jlora.data.hosts import require_same
from jlora.data.notes import Kept, Note, as_notes
from jlora.data.paths import Where
from jlora.data.sources import Sources, as_sources
from jlora.data.store import Items
from jlora.data.vocabulary import Fitted, unfitted
from jlora.data.writer import NUMBERS, STREAMS, Writer, open_items

FORMAT = 2  # to be raised when records are encoded otherwise
FILES = (*STREAMS, *NUMBERS, "kept", "told")
STALE_SECONDS = 24 * 3600
LEAST_BYTES = 2**20  # of data that are worth a folder

Make = Callable[[Writer, Note], tuple[Items, EncodeReport]]


def cached(
    root: str | pathlib.Path | None,
    where: Where | Sources,
    tokenizer: Any,
    settings: Mapping[str, Any],
    make: Make,
    note: Note,
    *,
    least: int = LEAST_BYTES,
) -> tuple[Items, EncodeReport]:
    """What `make` makes of the data, from the cache if it is there, or kept in it for the next time.

    The cache is a folder in `root`, named by what its contents depend on. A damaged folder is replaced, and if nothing
    can be written, the tokens are kept in memory; both are said.

    Args:
        root: the cache; None for no cache. Slow tokenizers have none either: what is in them cannot be told.
        settings: what else the result depends on; JSON.
        make: (what takes the items, what takes notes) → the items and the report. What it tells is told again when
            they come from the cache.
        least: bytes of data; less is not kept.
    """
    sources = as_sources(where)
    parts = {part.name: part.files() for part in sources.parts()}
    size = sum(file.stat().st_size for files in parts.values() for file in files)
    if root is None or not getattr(tokenizer, "is_fast", False) or size < max(least, 1):
        return make(Writer(), note)
    key = {
        "data": _digest_of_files(parts),
        "tokenizer": _digest_of_tokenizer(tokenizer),
        "settings": _digest([settings, sources.settings()]),
    }
    require_same(key)
    root = pathlib.Path(root).expanduser()
    folder = root / f"{key['data'][:16]}-{_digest(key)[:16]}"
    kept = _kept(folder, key, note)
    if not sharding.on_any_host(kept is None):  # or else all encode, each its share
        items, report, notes = kept
        notes.repeat(as_notes(note))
        note(f"the tokens come from {folder}")
        return items, report
    return _make(folder, key, make, note)


def _kept(folder: pathlib.Path, key: Mapping[str, str], note: Note) -> tuple[Items, EncodeReport, Kept] | None:
    """What `_open` returns of the folder; None, and a note, if it is of no use."""
    if not folder.exists():
        _say_what_differs(folder.parent, key, note)
        return None
    try:
        return _open(folder, key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        note(f"the tokens kept in {folder} cannot be used ({error}): the data are encoded again")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _make(folder: pathlib.Path, key: Mapping[str, str], make: Make, note: Note) -> tuple[Items, EncodeReport]:
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")  # hosts may share the folder
    notes = Kept(as_notes(note))

    def fail(error: Exception) -> None:
        note(f"the tokens cannot be kept in {folder} ({error}): the run goes on without a cache")
        shutil.rmtree(temporary, ignore_errors=True)

    _remove_stale(folder.parent)
    writer = Writer(temporary, fail)
    try:
        items, report = make(writer, notes)
        if writer.folder is not None:
            try:
                _close(temporary, key, items, report, notes)
                os.rename(temporary, folder)
            except OSError as error:
                if not folder.exists():  # as it may be by now, from another process
                    fail(error)
    finally:
        writer.close()
        shutil.rmtree(temporary, ignore_errors=True)  # what is mapped stays mapped
    return items, report


def _close(folder: pathlib.Path, key: Mapping[str, str], items: Items, report: EncodeReport, notes: Kept) -> None:
    """Writes what the folder lacks besides the items."""
    np.array(report.kept, np.int64).tofile(folder / "kept")
    notes.write(folder / "told")
    index = {
        "key": dict(key),
        "items": {"checksum": items.examples.checksum, "sides": items.sides, "names": list(items.values)},
        "files": {name: [(folder / name).stat().st_size, _checksum(folder / name)] for name in FILES},
        "report": dataclasses.asdict(dataclasses.replace(report, kept=())),
    }
    with open(folder / "index.json", "w", encoding="utf-8") as stream:
        json.dump(index, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _open(folder: pathlib.Path, key: Mapping[str, str]) -> tuple[Items, EncodeReport, Kept]:
    """The items of a folder, their report, and what was noted when they were made.

    Raises:
        ValueError, KeyError, TypeError, OSError: the folder is damaged, or of something else.
    """
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if other := [name for name in key if index["key"].get(name) != key[name]]:
        raise ValueError(f"they are of another {' and '.join(other)}")
    for name, (size, checksum) in index["files"].items():
        if (folder / name).stat().st_size != size or _checksum(folder / name) != checksum:
            raise ValueError(f"{name} is damaged")
    items = open_items(folder, **index["items"])
    kept = np.memmap(folder / "kept", np.int64, "r")
    lists = {name: tuple(value) for name, value in index["report"].items() if isinstance(value, list)}
    report = EncodeReport(**index["report"] | lists | {"kept": memoryview(kept)})
    return items, report, Kept.read(folder / "told")


def _say_what_differs(root: pathlib.Path, key: Mapping[str, str], note: Note) -> None:
    """Notes that tokens are kept for the same data, but for another tokenizer or other settings."""
    for path in sorted(root.glob(f"{key['data'][:16]}-*/index.json")):
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))["key"]
            other = " and ".join(name for name in ("tokenizer", "settings") if kept[name] != key[name])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if other:
            note(f"the tokens kept in {path.parent} are of another {other}: the data are encoded again")
            return


def _remove_stale(root: pathlib.Path) -> None:
    """Removes what runs that were killed left behind."""
    for path in root.glob(".*-*.*"):
        try:
            old = time.time() - path.stat().st_mtime > STALE_SECONDS
        except OSError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)


def _digest_of_tokenizer(tokenizer: Any) -> str:
    """A digest of all that a tokenizer makes of records, its template included."""
    plain = unfitted(tokenizer)
    template = plain.chat_template
    parts = {
        "tokenizer": plain.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in plain.special_tokens_map.items()},
        "template": template,
        "rows": tokenizer.rows if isinstance(tokenizer, Fitted) else None,
        # Templates that tell the date.
        "date": str(getattr(tokenizer, "date", None) or time.time()) if "strftime_now" in str(template) else "",
        "versions": [importlib.metadata.version(name) for name in ("jlora", "transformers", "tokenizers", "jinja2")],
        "format": FORMAT,
    }
    return _digest(parts)


def _digest_of_files(parts: Mapping[str, Sequence[pathlib.Path]]) -> str:
    found = hashlib.sha256()
    for name, files in parts.items():
        found.update(f"{name}\n".encode())  # rows that are noted are named by it
        for file in files:
            with file.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _checksum(path: pathlib.Path) -> int:
    found = 0
    with path.open("rb") as stream:
        while block := stream.read(2**24):
            found = zlib.crc32(block, found)
    return found
