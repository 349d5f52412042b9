"""Rows of tables: CSV, Parquet, Arrow, folders of `datasets`, data sets of the Hub."""

import ast
import csv
import functools
import io
import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jlora.errors import MissingFileError, UserError, number_of
from jlora.types import require

# Columns whose cells in a CSV file are lists or objects, as JSON or as Python's str() writes them ...
_VALUES = ("messages", "conversations", "conversation", "completions", "chat_template_kwargs")
# ... and those whose cells are lists if they look like one.
_MAYBE_VALUES = ("prompt", "completion", "chosen", "rejected", "history", "scores", "ranks")
_LIST = re.compile(r"\s*\[\s*[\[{\d.-]")
_FLAGS = ("label", "kto_tag")
_NUMBERS = ("margin", "ref_chosen_logps", "ref_rejected_logps")


class Cells(dict):
    """A row of a CSV file: every value is text."""


def csv_rows(stream: io.BufferedIOBase, *, tabs: bool = False) -> Iterator[tuple[int, Any]]:
    """(line, row) for each row of a CSV file whose first line names its columns; empty cells are left out.

    A row that cannot be read is given as the UserError that says why. Columns are separated by commas, or by what the
    first line has of comma, semicolon and tab; with `tabs`, by tabs.
    """
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    before = csv.field_size_limit(sys.maxsize)  # a document may well be longer than the default
    try:
        head = text.readline()
        between = "\t" if tabs else next((mark for mark in ",;\t" if mark in head), ",")
        reader = csv.reader(itertools.chain([head], text), delimiter=between, strict=True)
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names) or not all(names):
            raise UserError(f"found the column names {names}, expected a first line of different names")
        line = reader.line_num
        for cells in reader:
            place, line = line + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(names):
                yield (
                    place,
                    UserError(f"found {number_of(len(cells), 'cell')}, expected {len(names)}, one for each column"),
                )
                continue
            yield place, Cells({name: cell for name, cell in zip(names, cells, strict=True) if cell})
    except csv.Error as error:
        raise UserError(f"found a row that is not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"found a byte that is not UTF-8 ({error.reason}), expected UTF-8 text") from error
    finally:
        text.detach()  # whoever opened the stream closes it
        csv.field_size_limit(before)


def typed_cells(row: Mapping[str, str]) -> dict[str, Any]:
    """The row with its lists, objects, numbers and flags as such, by the names of their columns.

    Raises:
        UserError: a cell is not what its column holds.
    """
    return {name: _typed(name, cell) for name, cell in row.items()}


def _typed(name: str, cell: str) -> Any:
    if name in _VALUES or (name in _MAYBE_VALUES and _LIST.match(cell)):
        return _value(name, cell)
    if name in _FLAGS and (said := cell.strip().lower()) in ("true", "1", "false", "0"):
        return said in ("true", "1")
    if name in _NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell


def _value(name: str, cell: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # the latter builds plain values and runs nothing
        try:
            return read(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise UserError(f"{name}: found {cell.strip()[:40]!r}, expected a list as JSON")


def table_rows(path: pathlib.Path) -> Iterator[Any]:
    """The rows of a Parquet or an Arrow file.

    Raises:
        UserError: the file is damaged.
    """
    arrow = require("pyarrow", "datasets")
    try:
        if path.suffix == ".parquet":
            with require("pyarrow.parquet", "datasets").ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from map(without_nulls, batch.to_pylist())
            return
        with arrow.memory_map(str(path)) as source:
            opened = arrow.ipc.open_file if source.read(6) == b"ARROW1" else arrow.ipc.open_stream
            source.seek(0)
            for batch in opened(source).read_all().to_batches():
                batch.validate(full=True)  # the offsets of a damaged file can point anywhere in memory
                yield from map(without_nulls, batch.to_pylist())
    except (arrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a file of the kind that its name says ({error})") from error


def folder_rows(path: pathlib.Path) -> Iterator[Any]:
    """The rows of a folder of `datasets`.

    Raises:
        UserError: the folder is damaged.
    """
    datasets, arrow = require("datasets", "datasets"), require("pyarrow", "datasets")
    try:
        table = datasets.load_from_disk(str(path)).with_format(None)
        for batch in table.data.table.to_batches():
            batch.validate(full=True)
        yield from map(without_nulls, table)
    except (arrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # `datasets` does not validate its state.json or dataset_info.json, so damage shows as any of these.
        raise UserError(f"{path}: found a damaged folder of datasets ({type(error).__name__}: {error})") from error


def hub_rows(name: str, repository: str, subset: str | None, split: str) -> Iterator[Any]:
    """The rows of a split of a data set on the Hub.

    Raises:
        UserError: it is not there, or the Hub cannot be reached and nothing of it is in the cache.
    """
    yield from map(without_nulls, _load(name, repository, subset, split).with_format(None))


def hub_files(name: str, repository: str, subset: str | None, split: str) -> list[pathlib.Path]:
    """The files in the cache of `datasets` that hold a split of a data set on the Hub; see `hub_rows`."""
    return [pathlib.Path(file["filename"]) for file in _load(name, repository, subset, split).cache_files]


@functools.lru_cache(maxsize=8)
def _load(name: str, repository: str, subset: str | None, split: str) -> Any:
    datasets = require("datasets", "datasets")
    try:
        return datasets.load_dataset(repository, subset, split=split)
    except (OSError, ValueError, LookupError) as error:  # the errors of `datasets` and of the Hub are among these
        kind = UserError if isinstance(error, ValueError) else MissingFileError
        raise kind(
            f"{name}: found no file or folder there, and as a data set of the Hub it cannot be loaded "
            f"({' '.join(str(error).split())[:300]}); expected OWNER/NAME/SUBSET:SPLIT that is there, or in the cache "
            "of datasets where there is no network"
        ) from error


def without_nulls(value: Any) -> Any:
    """The value without nulls: Arrow gives every row all keys of its column, with null where a row has no such key."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
