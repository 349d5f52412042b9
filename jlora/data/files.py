"""Files of rows: JSONL, JSON arrays, Parquet, Arrow, folders of `datasets`. This module does not interpret the rows."""

import gzip
import io
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from jlora.errors import MissingFileError, UserError
from jlora.types import require

Row = tuple[str, Any]

KINDS = "a JSONL file, a JSON array, .parquet, .arrow or a folder of datasets"
_RUNS_CODE = "a file that can run code when it is opened, which jlora never opens: write its records as JSONL"
_TABLE = (
    "a table in text: python -c \"import pandas; pandas.read_csv('{path}'{separator})"
    ".to_json('{path}.jsonl', orient='records', lines=True)\" writes its rows as JSONL"
)
# Kinds of files that are refused by their names ...
_REFUSED_NAMES = {
    ".csv": _TABLE.replace("{separator}", ""),
    ".tsv": _TABLE.replace("{separator}", ", sep='\\t'"),
    ".xlsx": "a spreadsheet: write its rows as JSONL",
    ".yaml": "a YAML file: write its records as JSONL",
    ".yml": "a YAML file: write its records as JSONL",
} | dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy", ".npz"), _RUNS_CODE)
# ... and by their first bytes, whatever their names.
_REFUSED_STARTS = {
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it, or pack it with gzip",
    b"\xfd7zXZ\x00": "an xz file: unpack it, or pack it with gzip",
    b"BZh": "a bzip2 file: unpack it, or pack it with gzip",
    b"PK\x03\x04": "a zip file: unpack it, or pack it with gzip",
    b"\x80\x02": _RUNS_CODE,
    b"\x80\x03": _RUNS_CODE,
    b"\x80\x04": _RUNS_CODE,
    b"\x80\x05": _RUNS_CODE,
    b"PAR1": "a Parquet file: rename it to end with .parquet",
    b"ARROW1": "an Arrow file: rename it to end with .arrow",
    b"\xff\xfe": "text in UTF-16: write it as UTF-8",
    b"\xfe\xff": "text in UTF-16: write it as UTF-8",
}
_GZIP = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")
# JSON can spell half a character (a lone surrogate), which UTF-8 cannot represent.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def rows(path: pathlib.Path) -> Iterator[Row]:
    """(place, row) for every row in order; a row that cannot be read is given as the UserError that says why.

    A place is "path:LINE" for JSONL and JSON arrays, and "path:NUMBER" for tables. Blank lines are skipped.

    Raises:
        UserError: the file does not exist, is damaged, or is of a kind that is not supported.
    """
    if not path.exists() or (path.is_dir() and not (path / "state.json").exists()):
        raise MissingFileError(f"{path}: found {_absent(path)}, expected {KINDS}")
    if path.is_dir():
        table = _folder_rows(path)
    elif path.suffix in (".parquet", ".arrow"):
        table = _table_rows(path)
    else:
        with path.open("rb") as file:
            yield from _text_rows(path, file)
        return
    yield from ((f"{path}:{number}", _without_nulls(row)) for number, row in enumerate(table, start=1))


def digest(path: str | pathlib.Path) -> str:
    """Eight hex digits that depend on every byte of a file, or of all files in a folder."""
    path, found = pathlib.Path(path), 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while block := stream.read(2**24):
                    found = zlib.crc32(block, found)
    return f"{found:08x}"


def parse_json(text: str, expected: str = "one line of JSON") -> Any:
    """The value of a JSON text.

    Args:
        expected: what the text should have been, for the error message.

    Raises:
        UserError: the text is not JSON, nests too deeply, or contains half a character (a lone surrogate).
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"found {text.strip()[:40]!r}, expected {expected} ({error.msg}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # for example thousands of digits, or thousands of nested brackets
        raise UserError(f"found JSON that cannot be read ({error})") from error
    if _SURROGATE_ESCAPE.search(text):
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: Any) -> None:
    for field, text in _texts(value, ""):
        if lone := _SURROGATE.search(text):
            found = ascii(text[max(0, lone.start() - 20) : lone.end()])
            raise UserError(
                f"{field or 'the row'}: found {found}, which ends with half of a character (a lone surrogate), "
                "expected whole characters"
            )


def _texts(value: Any, field: str) -> Iterator[tuple[str, str]]:
    """(field, text) for every text in a value, including the keys of objects."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{field}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = f"{field}.{key}".lstrip(".").encode("ascii", "backslashreplace").decode()
            yield inner, key
            yield from _texts(item, inner)


def _absent(path: pathlib.Path) -> str:
    if not path.is_dir():
        return "nothing there"
    return "a folder of several splits (give one of them)" if (path / "dataset_dict.json").exists() else "a folder"


def _text_rows(path: pathlib.Path, file: io.BufferedReader) -> Iterator[Row]:
    """The rows of a JSONL file or of a file with one JSON array, gzipped or not."""
    _refuse_name(path)
    packed = file.peek(2)[:2] == _GZIP
    stream = io.BufferedReader(gzip.GzipFile(fileobj=file)) if packed else file
    try:
        _refuse_start(path, stream.peek(8)[:8])
        lines = enumerate(stream, start=1)
        number, first = next(((number, line) for number, line in lines if _words(line)), (0, b""))
        if _words(first).startswith(b"["):
            rest = stream.read()
            if _is_array(first, rest):
                yield from _array_rows(path, number, first + rest)
                return
            lines = enumerate(io.BytesIO(rest), start=number + 1)
        elif _words(first).startswith(b"{") and _words(first)[-1:] in b"{[,":
            second = next(((number, line) for number, line in lines if _words(line)), (number, b""))
            if not _is_json(second[1]):
                raise UserError(
                    f"{path}:{number}: found an object that continues after its line, expected one record on each line "
                    "(JSONL), or one JSON array of all records"
                )
            lines = itertools.chain([second], lines)
        if first:
            yield f"{path}:{number}", _line_value(first)
        yield from ((f"{path}:{number}", _line_value(line)) for number, line in lines if _words(line))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: found a damaged gzip file ({error}): write or download it again") from error


def _is_array(first: bytes, rest: bytes) -> bool:
    """Whether a file whose first line begins with a bracket is one array, rather than JSONL with an odd first line."""
    if _is_json(first):
        return not rest.strip()
    second = next((line for line in io.BytesIO(rest) if line.strip()), b"]")
    return rest.rstrip().endswith(b"]") or not _is_json(second)


def _refuse_name(path: pathlib.Path) -> None:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    if found := _REFUSED_NAMES.get(name.suffix.lower()):
        raise UserError(f"{path}: found {found.replace('{path}', str(path))}")


def _refuse_start(path: pathlib.Path, start: bytes) -> None:
    for magic, found in _REFUSED_STARTS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: found {found}")


def _words(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _is_json(line: bytes) -> bool:
    return not isinstance(_line_value(line), UserError)


def _line_value(line: bytes) -> Any:
    """The value of a line, or the UserError that says why it has none."""
    try:
        return parse_json(_decode(line))
    except UserError as error:
        return error


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"found a byte that is not UTF-8 at column {error.start + 1}, expected UTF-8 text") from error


def _array_rows(path: pathlib.Path, number: int, content: bytes) -> Iterator[Row]:
    """The items of the JSON array that begins on line `number`."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = number + content.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: found a byte that is not UTF-8, expected UTF-8 text") from error
    decode, counted, line, index = json.JSONDecoder().raw_decode, 0, number, 0

    def skip(place: int) -> int:
        return _SPACE.match(text, place).end()

    place = skip(text.index("[") + 1)
    try:
        while index or text[place : place + 1] != "]":
            value, end = decode(text, place)
            line, counted, index = line + text.count("\n", counted, place), place, index + 1
            yield f"{path}:{line} (record {index})", _checked(value, text[place:end])
            place = skip(end)
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            place = skip(place + 1)
        if (place := skip(place + 1)) != len(text):
            raise json.JSONDecodeError("Extra data after the array", text, place)
    except json.JSONDecodeError as error:
        where = f"{path}:{number + error.lineno - 1}"
        raise UserError(f"{where}: found a JSON array that is damaged ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: found a JSON array that cannot be read, after record {index} ({error})") from error


def _checked(value: Any, text: str) -> Any:
    """The value, or the UserError for a lone surrogate in its text."""
    try:
        if _SURROGATE_ESCAPE.search(text):
            _refuse_surrogates(value)
    except UserError as error:
        return error
    return value


def _table_rows(path: pathlib.Path) -> Iterator[Any]:
    arrow = require("pyarrow", "datasets")
    try:
        if path.suffix == ".parquet":
            with require("pyarrow.parquet", "datasets").ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
            return
        with arrow.memory_map(str(path)) as source:
            opened = arrow.ipc.open_file if source.read(6) == b"ARROW1" else arrow.ipc.open_stream
            source.seek(0)
            for batch in opened(source).read_all().to_batches():
                batch.validate(full=True)  # the offsets of a damaged file can point anywhere in memory
                yield from batch.to_pylist()
    except (arrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a file of the kind that its name says ({error})") from error


def _folder_rows(path: pathlib.Path) -> Iterator[Any]:
    """The rows of a folder of `datasets`."""
    datasets, arrow = require("datasets", "datasets"), require("pyarrow", "datasets")
    try:
        table = datasets.load_from_disk(str(path)).with_format(None)
        for batch in table.data.table.to_batches():
            batch.validate(full=True)
        yield from table
    except (arrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # `datasets` does not validate its state.json or dataset_info.json, so damage shows as any of these.
        raise UserError(f"{path}: found a damaged folder of datasets ({type(error).__name__}: {error})") from error


def _without_nulls(value: Any) -> Any:
    """The value without nulls: Arrow gives every row all keys of its column, with null where a row has no such key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
