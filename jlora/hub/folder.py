"""Folders written whole: under a temporary name first, then swapped in, so that no reader meets half of one."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path, *, marker: str, stale: Sequence[str]) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `path` when the block ends without an error.

    Files of an existing folder that the new one does not have are kept, except those that match a `stale` pattern.

    Args:
        marker: the file by which an existing folder is known to be of the kind that may be replaced.

    Raises:
        FileExistsError: `path` exists, is not empty and has no `marker`; nothing was touched.
    """
    target = Path(path).expanduser().absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / marker).is_file()):
        raise FileExistsError(f"{target} exists and has no {marker}, so it is left alone; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(target)
    fresh.mkdir()
    try:
        yield fresh
        for entry in fresh.iterdir():  # safetensors makes its files readable by their owner alone
            entry.chmod((fresh / marker).stat().st_mode)
        _swap(fresh, target, stale)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


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
