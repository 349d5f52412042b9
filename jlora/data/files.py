"""Files of rows: JSONL, JSON arrays, tables, plain text, packed or not. This module does not interpret the rows."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from jlora.data import tables
from jlora.data.paths import PACKED, Part, Reading, Where, locate
from jlora.errors import UserError
from jlora.types import require

Row = tuple[str, Any]

_RUNS_CODE = "a file that can run code when it is opened, which jlora never opens: write its records as JSONL"
# Kinds of files that are refused by their names ...
_REFUSED_NAMES = {
    ".xlsx": "a spreadsheet: write its rows as CSV or JSONL",
    ".yaml": "a YAML file: write its records as JSONL",
    ".yml": "a YAML file: write its records as JSONL",
} | dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy", ".npz"), _RUNS_CODE)
# ... and by their first bytes, whatever their names.
_REFUSED_STARTS = {
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


def _zstd(file: io.BufferedReader) -> Any:
    return require("pyarrow", "datasets").CompressedInputStream(file, "zstd")


# What unpacks a file, by its first bytes, whatever its name.
_UNPACKED: dict[bytes, tuple[str, Callable[[io.BufferedReader], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\x00": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}
_TEXTS, _CSV = (".txt", ".md"), (".csv", ".tsv")
_SPACE = re.compile(r"[ \t\r\n]*")
# How JSON begins: with an object, or an array of objects or of nothing.
_JSON_START = re.compile(rb"\{|\[\s*(?:[\[{\]]|$)")
# JSON can spell half a character (a lone surrogate), which UTF-8 cannot represent.
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def rows(where: Where) -> Iterator[Row]:
    """(place, row) for every row in order; a row that cannot be read is given as the UserError that says why.

    A place is "path:LINE" for JSONL, JSON arrays and CSV, and "path:NUMBER" for other tables. Blank lines are skipped.
    A .txt or .md file without JSON is one row, {"text": …}.

    Raises:
        UserError: there is no such file, or one is damaged, or of a kind that is not supported.
    """
    for part in locate(where):
        yield from rows_of(part)


def rows_of(part: Part, reading: Reading | None = None) -> Iterator[Row]:
    """The rows of one part; see `rows`."""
    reading = reading or Reading()
    if part.hub:
        table = tables.hub_rows(part.name, *part.hub)
    elif part.path.is_dir():
        table = tables.folder_rows(part.path)
    elif part.path.suffix in (".parquet", ".arrow"):
        table = tables.table_rows(part.path)
    else:
        with part.path.open("rb") as file, reading.watch(part, file):
            yield from _text_rows(part.path, file)
        return
    with reading.watch(part):
        yield from ((f"{part.name}:{number}", row) for number, row in enumerate(table, start=1))


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


def _text_rows(path: pathlib.Path, file: io.BufferedReader) -> Iterator[Row]:
    """The rows of a text file, packed or not."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    if found := _REFUSED_NAMES.get(name.suffix.lower()):
        raise UserError(f"{path}: found {found}")
    packed, unpack = next(
        (found for magic, found in _UNPACKED.items() if file.peek(8)[:8].startswith(magic)), ("", None)
    )
    stream = io.BufferedReader(unpack(file)) if unpack else file
    damages = (EOFError, OSError, zlib.error, lzma.LZMAError) if packed else ()
    damages += (require("pyarrow", "datasets").ArrowException,) if packed == "zstd" else ()
    try:
        _refuse_start(path, start := stream.peek(64)[:64])
        if name.suffix.lower() in _CSV:
            yield from _csv_rows(path, stream, tabs=name.suffix.lower() == ".tsv")
        elif name.suffix.lower() in _TEXTS and not _JSON_START.match(_words(start)):
            yield from _whole_text(path, stream.read())
        else:
            yield from _json_rows(path, stream)
    except damages as error:
        raise UserError(f"{path}: found a damaged {packed} file ({error}): write or download it again") from error


def _csv_rows(path: pathlib.Path, stream: Any, *, tabs: bool) -> Iterator[Row]:
    try:
        yield from ((f"{path}:{line}", row) for line, row in tables.csv_rows(stream, tabs=tabs))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _whole_text(path: pathlib.Path, content: bytes) -> Iterator[Row]:
    if not content.strip():
        return
    try:
        yield f"{path}:1", {"text": _decode(content)}
    except UserError as error:
        yield f"{path}:1", error


def _json_rows(path: pathlib.Path, stream: Any) -> Iterator[Row]:
    """The rows of a JSONL file or of a file with one JSON array."""
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


def _is_array(first: bytes, rest: bytes) -> bool:
    """Whether a file whose first line begins with a bracket is one array, rather than JSONL with an odd first line."""
    if _is_json(first):
        return not rest.strip()
    second = next((line for line in io.BytesIO(rest) if line.strip()), b"]")
    return rest.rstrip().endswith(b"]") or not _is_json(second)


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
