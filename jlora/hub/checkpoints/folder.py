"""Folders and files that are written under a temporary name and then swapped in: no reader sees a partial one."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors

from jlora.errors import ExistingFileError, NoSpaceError, UserError, size_of
from jlora.hub.cards import TAG, is_own
from jlora.hub.checkpoints.shards import WRITER
from jlora.hub.checkpoints.source import gguf_files

OVERWRITE = "say --force (from Python: force=True)"
GGUF = b"GGUF"
# jlora's tag as a GGUF file holds it: the key, "an array", "of texts", their number, and the text after its length.
TAGGED = b"general.tags" + struct.pack("<IIQQ", 9, 8, 1, len(TAG)) + TAG.encode()


@contextlib.contextmanager
def replacing(path: str | Path, *, marker: str, stale: Sequence[str]) -> Iterator[Path]:
    """Yields a temporary folder to write into, which becomes `path` when the block ends without an error.

    Files of an existing folder that the new one does not have are kept, except those that match a `stale` pattern.
    If `path` is a link, its target is replaced.

    Args:
        marker: the file that an existing folder must have to be replaced.
        stale: patterns of files that are not kept.

    Raises:
        FileExistsError: `path` exists, is not empty and has no `marker`; nothing was touched.
        NoSpaceError: the disk is full; nothing was touched, and nothing is left of the new folder.
    """
    target = Path(path).expanduser().resolve()
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / marker).is_file()):
        raise ExistingFileError(f"{target} exists and has no {marker}, so it is left alone; choose another folder")
    fresh = _beside(target)
    try:
        with _naming_a_full_disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh.mkdir()
            yield fresh
        for entry in fresh.iterdir():  # safetensors makes its files readable by their owner only
            if entry.is_file():
                entry.chmod((fresh / marker).stat().st_mode)
        _swap(fresh, target, stale)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def require_own(out: str | Path, otherwise: str = f"choose another place, or {OVERWRITE}") -> None:
    """Checks that writing `out` replaces no adapter, model or GGUF file that something other than jlora wrote.

    jlora's models say so in the header of their weights: another program's may have been written beside the card since.
    Its adapters say so in their card, its GGUF files in their tags. Settings without weights are not jlora's.

    Args:
        otherwise: what the user can do if there is one.

    Raises:
        FileExistsError: there is one, and it is left alone.
    """
    target = Path(out).expanduser()
    weights = [*target.glob("*.safetensors"), *target.glob("pytorch_model*.bin"), *target.glob("adapter_model*.bin")]
    settings = [target / "config.json", target / "adapter_config.json"]
    own = [is_own(target) if file.name.startswith("adapter_model") else _wrote(file) for file in weights]
    if not all(own) or (not own and any(file.exists() for file in settings)):
        raise ExistingFileError(
            f"{target} holds a model or an adapter that jlora did not write, so it is left alone; {otherwise}"
        )
    if _begins_with(target, GGUF) and not _is_tagged(target):
        raise ExistingFileError(f"{target} is a GGUF file that jlora did not write, so it is left alone; {otherwise}")


def _wrote(weights: Path) -> bool:
    """Whether jlora wrote these weights of a model."""
    if weights.suffix != ".safetensors":
        return False
    try:
        with safetensors.safe_open(weights, framework="numpy") as file:
            return WRITER.items() <= (file.metadata() or {}).items()
    except safetensors.SafetensorError:  # not a file of weights at all
        return False


def _is_tagged(file: Path) -> bool:
    """Whether a GGUF file has jlora's tag, which it writes among the first values."""
    with file.open("rb") as stream:
        return TAGGED in stream.read(1024)


def refuse_inputs(out: str | Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Checks that writing `out` replaces none of the inputs.

    Args:
        inputs: the user's name for an input ("--model") → folder, file or Hub id; None if it is not given.

    Raises:
        ValueError: `out` is one of the inputs, or several; all are named.
    """
    target = Path(out).expanduser().resolve()
    found = {name: Path(path).expanduser() for name, path in inputs.items() if path}
    same = [
        name
        for name, path in found.items()
        if path.exists() and target in (path.resolve(), *(file.resolve() for file in gguf_files(path)))
    ]
    if same:
        raise UserError(f"{out}: would be overwritten, but it is also {' and '.join(same)}; choose another place")


@contextlib.contextmanager
def replacing_file(path: str | Path, *, magic: bytes) -> Iterator[Path]:
    """Yields the path of a temporary file to write, which becomes `path` when the block ends without an error.

    If `path` is a link, its target is replaced.

    Args:
        magic: the bytes that an existing file must begin with to be replaced.

    Raises:
        FileExistsError: `path` is a folder, or a file of another kind; nothing was touched.
        NoSpaceError: the disk is full; nothing was touched, and nothing is left of the new file.
    """
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise ExistingFileError(f"{target} is a folder; give the name of a file")
    if target.is_file() and not _begins_with(target, magic):
        raise ExistingFileError(
            f"{target} exists and is not {magic.decode()}, so it is left alone; choose another name"
        )
    fresh = _beside(target)
    try:
        with _naming_a_full_disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield fresh
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming_a_full_disk(target: Path) -> Iterator[None]:
    """Turns the block's errors about a full disk into one NoSpaceError that says where."""
    try:
        yield
    except Exception as error:  # safetensors' and tokenizers' errors have no common class
        if not _is_full(error):
            raise
        free = shutil.disk_usage(_existing(target)).free
        raise NoSpaceError(
            f"{target}: not enough space ({error}); {size_of(free)} are free. Nothing of it remains, and "
            "what was there before is untouched; free some space, or choose another place"
        ) from error


def _is_full(error: Exception) -> bool:
    """Whether the error means a full disk or quota, or a file that is too large; NumPy only says how much it wrote."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    found = re.search(r"\(os error (\d+)\)", str(error))
    short = isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error))
    return getattr(error, "errno", None) in codes or (found is not None and int(found[1]) in codes) or bool(short)


def _existing(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.is_dir())


def _begins_with(file: Path, magic: bytes) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _swap(fresh: Path, target: Path, stale: Sequence[str]) -> None:
    if not target.exists():
        os.replace(fresh, target)
        return
    old = _beside(target)
    os.replace(target, old)
    os.replace(fresh, target)
    for entry in old.iterdir():
        if not (target / entry.name).exists() and not any(entry.match(pattern) for pattern in stale):
            os.replace(entry, target / entry.name)
    shutil.rmtree(old)


def _beside(target: Path) -> Path:
    """An unused hidden name in the same folder, so that renaming stays on one file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")
