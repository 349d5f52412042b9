"""What a path of data names: files, the files of a folder or a pattern, a folder of `datasets`, data on the Hub."""

import contextlib
import dataclasses
import glob
import io
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence

from jlora.data import tables
from jlora.errors import MissingFileError, UserError, first_few, raise_all

Where = str | os.PathLike | Sequence[str | os.PathLike]

KINDS = (
    "a JSONL file, a JSON array, .csv, .tsv, .parquet, .arrow, .txt, a folder or a pattern of such files, a folder of "
    "datasets, or the name of a data set on the Hub"
)
PACKED = (".gz", ".bz2", ".xz", ".zst")
_DATA = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
# Files that stand beside data and are none.
_ABOUT = re.compile(r"(?:readme|license|licence|notice|requirements|dataset_infos?|state)\..*", re.IGNORECASE)
_SPLIT = r"(?:train|training|valid|validation|val|dev|test|testing|eval|evaluation|holdout)"
_NAMES_SPLIT = re.compile(rf"(?:^|[-_. ])({_SPLIT})(?:$|[-_. \d])", re.IGNORECASE)
_TRAINS = ("train", "training")
_HUB = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<subset>[\w-][\w.-]*))?(?::(?P<split>[\w+\[\]:%.-]+))?")


@dataclasses.dataclass(frozen=True)
class Part:
    """Data that are read in one piece.

    Attributes:
        name: how messages and checkpoints name it: its path as it was given.
        path: the file or the folder of `datasets`; None for data of the Hub.
        hub: what to load from the Hub: (id, subset, split).
    """

    name: str
    path: pathlib.Path | None = None
    hub: tuple[str, str | None, str] | None = None

    def files(self) -> list[pathlib.Path]:
        """The files that hold it, in order."""
        if self.hub:
            return tables.hub_files(self.name, *self.hub)
        found = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        return [file for file in found if file.is_file()]

    def digest(self) -> str:
        """Eight hex digits that depend on every byte of its files."""
        found = 0
        for file in self.files():
            with file.open("rb") as stream:
                while block := stream.read(2**24):
                    found = zlib.crc32(block, found)
        return f"{found:08x}"


class Reading:
    """How much of some files has been read, by bytes as they are on disk."""

    def __init__(self) -> None:
        self._total = self._before = 0
        self._file: io.BufferedReader | None = None

    def begin(self, parts: Sequence[Part]) -> None:
        """From now on these are read."""
        self._total, self._before, self._file = sum(map(_size, parts)), 0, None

    @contextlib.contextmanager
    def watch(self, part: Part, file: io.BufferedReader | None = None) -> Iterator[None]:
        """A part is read inside the context; without a file, it counts when it has been read."""
        self._file = file
        yield
        self._before, self._file = self._before + _size(part), None

    @property
    def share(self) -> float | None:
        """The share that has been read; None if that is not known."""
        done = self._before + (self._file.tell() if self._file and not self._file.closed else 0)
        return min(1.0, done / self._total) if done and self._total else None


def _size(part: Part) -> int:
    return sum(file.stat().st_size for file in part.files())


def locate(where: Where) -> list[Part]:
    """What a path names, or several do, in order.

    A path is a file, a folder of `datasets`, a folder of data files (all of one kind, none of another split), a pattern
    ("shards/*.jsonl.gz", with ** for folders in between), several of them with commas, or "OWNER/NAME", a data set of
    the Hub: "OWNER/NAME/SUBSET:SPLIT", by default its only subset, and the split "train".

    Raises:
        UserError: nothing is there, or a folder leaves open what to read; all faults are named.
    """
    if not isinstance(where, str | os.PathLike):
        found, faults = [], []
        for one in where:
            try:
                found += locate(one)
            except UserError as error:
                faults.append(str(error))
        raise_all(faults)
        if not found:
            raise MissingFileError(f"found no paths, expected {KINDS}")
        return found
    name, path = str(where), pathlib.Path(where)
    if path.is_file():
        return [Part(name, path)]
    if path.is_dir():
        return _in_folder(name, path)
    if glob.has_magic(name):
        if files := sorted(file for file in glob.glob(name, recursive=True) if pathlib.Path(file).is_file()):
            return [Part(file, pathlib.Path(file)) for file in files]
        raise MissingFileError(f"{name}: found no file of this pattern, expected {KINDS}")
    if "," in name:
        return locate([one for one in map(str.strip, name.split(",")) if one])
    if (match := _HUB.fullmatch(name)) and not _looks_local(name):
        return [Part(name, hub=(match["id"], match["subset"], match["split"] or "train"))]
    raise MissingFileError(f"{name}: found nothing there, expected {KINDS}")


def digest(where: Where) -> str:
    """Eight hex digits that depend on every byte of all files."""
    found = [part.digest() for part in locate(where)]
    return found[0] if len(found) == 1 else f"{zlib.crc32(' '.join(found).encode()):08x}"


def _looks_local(name: str) -> bool:
    """Whether a path that does not exist was meant as one of this machine rather than of the Hub."""
    suffixes = pathlib.PurePath(name.partition(":")[0]).suffixes
    return bool({*_DATA, *PACKED} & set(suffixes)) or pathlib.Path(pathlib.PurePath(name).parts[0]).exists()


def _in_folder(name: str, folder: pathlib.Path) -> list[Part]:
    if (folder / "state.json").exists():
        return [Part(name, folder)]
    if (folder / "dataset_dict.json").exists():
        raise MissingFileError(f"{name}: found a folder of several splits (give one of them), expected {KINDS}")
    files = sorted(_data_files(folder))
    if not files:
        raise MissingFileError(f"{name}: found a folder without data files, expected {KINDS}")
    if len(kinds := dict.fromkeys(map(_kind, files))) > 1:
        raise UserError(
            f"{name}: found files of several kinds ({first_few(kinds)}), expected one: give a pattern such as "
            f"{folder / '*'}{next(iter(kinds))}"
        )
    splits = {split: file for file in files for split in _splits(file.relative_to(folder))}
    if len({split in _TRAINS for split in splits}) > 1:
        raise UserError(
            f"{name}: found files of several splits ({first_few(file.name for file in splits.values())}), expected "
            f"those of one: give one of them, or a pattern such as {folder}/**/*train*"
        )
    return [Part(str(file), file) for file in files]


def _data_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for file in folder.rglob("*"):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        if not hidden and file.is_file() and _kind(file) in _DATA and not _ABOUT.fullmatch(file.name):
            yield file


def _kind(file: pathlib.Path) -> str:
    """The suffix that says what is in a file, packed or not."""
    return (file.with_suffix("") if file.suffix.lower() in PACKED else file).suffix.lower()


def _splits(path: pathlib.Path) -> set[str]:
    """The splits that a file's name, or else those of its folders, speak of."""
    for part in (path.name.partition(".")[0], *reversed(path.parts[:-1])):
        if found := {name.lower() for name in _NAMES_SPLIT.findall(part)}:
            return found
    return set()
