"""Files: the same records in every container, one message for what is not read, and no traceback for any junk."""

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import pickle
import random
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jlora.data import digest, read_preferences, read_prompts, read_records
from jlora.errors import MissingFileError, UserError

ROWS = [
    {"messages": [{"role": "user", "content": f"é {n}?"}, {"role": "assistant", "content": f"[{n}]"}], "id": n}
    for n in range(5)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


CONTAINERS = {
    "a.jsonl": LINES,
    "a.txt": LINES.replace("\n", "\r\n\r\n"),
    "bom.jsonl": "\ufeff\n" + LINES,
    "array.json": json.dumps(ROWS),
    "pretty.json": "\n " + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n\n",
    "array.jsonl": json.dumps(ROWS) + "\n",
    "lines in array.json": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]",
    "first with the bracket.json": "[" + ",\n".join(json.dumps(row) for row in ROWS) + "]",
}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_records(tmp_path, name, packed):
    path = write(tmp_path, f"{name}{packed}", PACKED[packed](CONTAINERS[name].encode()))
    assert read_records(path) == ROWS
    # How a file is packed is told by its content, whatever the name.
    assert read_records(path.rename(tmp_path / "data")) == ROWS


@pytest.mark.parametrize("packed", PACKED)
def test_csv_gives_the_same_records(tmp_path, packed):
    long = "word " * 40_000  # longer than the limit of the csv module
    rows = [*ROWS, {"messages": [{"role": "assistant", "content": f'a "quoted",\nline; {long}'}], "id": 9}]
    for name, between, write_cell in (
        ("a.csv", ",", json.dumps),
        ("b.csv", ";", str),  # as pandas writes a column of lists
        ("c.tsv", "\t", json.dumps),
    ):
        text = io.StringIO()
        table = csv.writer(text, delimiter=between)
        table.writerow(["id", "messages", "empty"])
        table.writerows([row["id"], write_cell(row["messages"]), ""] for row in rows)
        path = write(tmp_path, f"{name}{packed}", PACKED[packed](b"\xef\xbb\xbf" + text.getvalue().encode()))
        assert read_records(path) == [row | {"id": str(row["id"])} for row in rows]
    assert csv.field_size_limit() < len(long)


def test_cells_are_what_their_columns_hold(tmp_path):
    path = write(tmp_path, "a.csv", "prompt,completion,label\nq,a,True\nr,[b],0\n")
    assert read_preferences(path, "unpaired") == [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "r", "completion": "[b]", "label": False},
    ]
    path = write(tmp_path, "b.csv", "prompt,chosen,rejected,margin\nq,a,b,1.5\n")
    assert read_preferences(path, "pairs") == [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.5}]


def test_a_file_of_words_is_one_text(tmp_path):
    for name, text in (("a.txt", "[Chapter 1]\n\nIt was.\n"), ("b.md", "# Title\n{}\n")):
        path = write(tmp_path, name, text)
        assert read_records(path) == [{"text": text, "prompt": "", "completion": text}]


def test_tables_give_the_same_records(tmp_path):
    parquet(tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet") == ROWS


def arrow(path, new=pyarrow.ipc.new_file):
    table = pyarrow.Table.from_pylist(ROWS)
    with new(path, table.schema) as file:
        file.write_table(table)


TABLES = {
    "a.parquet": parquet,
    "a.arrow": arrow,
    "stream.arrow": lambda path: arrow(path, pyarrow.ipc.new_stream),
    "folder": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
}


@pytest.mark.parametrize("count", [12, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", TABLES)
def test_a_damaged_file_is_refused_or_read(tmp_path, kind, count):
    draw = random.Random(kind)
    whole, broken = tmp_path / f"whole {kind}", tmp_path / kind
    TABLES[kind](whole)
    for _ in range(count):
        if whole.is_dir():
            shutil.copytree(whole, broken, dirs_exist_ok=True)
        else:
            shutil.copy(whole, broken)
        victim = draw.choice(sorted(broken.iterdir())) if broken.is_dir() else broken
        content = bytearray(victim.read_bytes())
        place = draw.randrange(len(content))
        if draw.random() < 0.5:
            content[place] = draw.randrange(256)
        else:
            del content[place : place + draw.choice([1, 16, len(content)])]
        victim.write_bytes(content)
        try:
            read_records(broken, on_error="skip", note=lambda message: None)
        except UserError as error:
            assert str(broken) in str(error)


def test_rows_are_named_where_they_stand(tmp_path):
    bad = [ROWS[0], 3, ROWS[1], {"messages": 1}]
    for name, content, places in (
        ("a.json", json.dumps(bad), ["1 (record 2)", "1 (record 4)"]),
        ("b.json", "[\n" + ",\n".join(map(json.dumps, bad)) + "\n]", ["3 (record 2)", "5 (record 4)"]),
        ("c.jsonl", "\n".join(map(json.dumps, bad)), ["2", "4"]),
    ):
        for packed in (False, True):
            path = write(tmp_path, name, gzip.compress(content.encode()) if packed else content)
            with pytest.raises(UserError) as error:
                read_records(path)
            faults = str(error.value).splitlines()[1:]
            starts = [f"  {path}:{place}: found a number" for place in places]
            assert faults[0].startswith(starts[0])
            assert faults[1].startswith(f"  {path}:{places[1]}: messages: found a number")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "instruction,instruction\nq,a\n", "a.csv: found the column names ['instruction', 'instruction']"),
        ("a.csv", 'instruction,output\nq,"a\n', "a.csv: found a row that is not CSV (unexpected end of data)"),
        ("a.csv", "instruction,output\nq,a,b\n", "a.csv:2: found 3 cells, expected 2, one for each column"),
        ("a.csv", b"instruction,output\n\xff,a\n", "a.csv: found a byte that is not UTF-8"),
        ("a.csv", 'messages\n"[{"\n', "a.csv:2: messages: found '[{', expected a list as JSON"),
        ("a.txt", b"\xff", "a.txt:1: found a byte that is not UTF-8"),
        ("a.txt", "\n \n", "found no records"),
        ("a.yaml", "- prompt: q\n  completion: a\n", "found a YAML file: write its records as JSONL"),
        ("a.xlsx", "PK", "found a spreadsheet"),
        ("a.pkl", pickle.dumps(ROWS), "found a file that can run code when it is opened, which jlora never opens"),
        ("a.jsonl", pickle.dumps(ROWS), "found a file that can run code when it is opened, which jlora never opens"),
        ("a.pt", b"", "found a file that can run code"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "found a damaged zstd file"),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())[:-9], "found a damaged bzip2 file"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-9], "found a damaged xz file"),
        ("a.zip", b"PK\x03\x04", "found a zip file: unpack it"),
        ("a.jsonl", "{}".encode("utf-16"), "found text in UTF-16: write it as UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "found a damaged gzip file"),
        ("a.gz", gzip.compress(LINES.encode(), mtime=0)[:20] + b"junk" * 9, "found a damaged gzip file"),
        ("a.json", json.dumps(ROWS, indent=1)[:-9], "found a JSON array that is damaged"),
        ("a.json", json.dumps(ROWS) + "[]", "found a JSON array that is damaged (Extra data"),
        ("a.json", json.dumps(ROWS)[:-1] + ",]", "found a JSON array that is damaged"),
        ("a.json", "[" * 100_000, "found a JSON array that cannot be read"),
        ("a.json", b'[\n"\xff"]', "a.json:2: found a byte that is not UTF-8"),
        ("a.json", json.dumps(ROWS[0], indent=2), "a.json:1: found an object that continues after its line"),
        ("a.json", json.dumps({"data": ROWS}), "found the fields ['data'] without prompt and completion"),
        (
            "a.jsonl",
            '{"asked": "q", "id": 3}',
            "the first is asked='q', id=3 (data.columns says which columns to read)",
        ),
        ("a.json", "[]", "found no records, expected an object with"),
        ("a.jsonl", "", "found no records, expected an object with"),
    ],
)
def test_what_is_not_read_is_one_message(tmp_path, name, content, words):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_what_looks_like_no_json_at_all_is_not_one_line_a_row(tmp_path):
    path = write(tmp_path, "a.jsonl", "".join(f"- prompt: {n}\n  completion: {n}\n" for n in range(500)))
    with pytest.raises(UserError) as error:
        read_records(path)
    assert "1000 of 1,000 records cannot be used" in str(error.value)
    assert len(str(error.value).splitlines()) <= 9


@pytest.mark.parametrize(
    "line", ["[" * 5_000 + "]" * 5_000, "9" * 5_000, '{"messages": ' + "[" * 5_000, "-", "nul", "\x00"]
)
def test_a_line_that_json_chokes_on_is_named(tmp_path, line):
    path = write(tmp_path, "a.jsonl", LINES + line + "\n")
    with pytest.raises(UserError, match=r"a.jsonl:6: found"):
        read_records(path)


def test_lines_of_which_the_first_is_broken_are_lines(tmp_path):
    for first in ("{", '{"messages": [', '"q"}], "id": 3}', "[3]", '[{"role": "user"}], "id": 3}'):
        path = write(tmp_path, "a.jsonl", first + "\n" + LINES)
        notes = []
        assert read_records(path, on_error="skip", note=notes.append) == ROWS
        assert f"{path}:1: " in notes[0]


def test_the_digest_covers_the_bytes_of_packed_files(tmp_path):
    one, two = (write(tmp_path, f"{n}.jsonl.gz", gzip.compress(LINES.encode(), mtime=n)) for n in (1, 2))
    assert digest(one) != digest(two)
    assert digest([one, two]) != digest([two, one])
    assert read_records(one) == read_records(two)


def test_a_folder_or_nothing_says_what_can_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(MissingFileError, match=r"expected a JSONL file, a JSON array, .csv, .tsv, .parquet"):
            read_records(path)


WORDS = (
    "messages conversations prompt completion chosen rejected completions scores label role content from value type "
    "text tools functions function_call tool_calls name arguments system question instruction input output history "
    "weight train masked margin chat_template_kwargs kto_tag context answer images"
)
KEYS = WORDS.split()
LEAVES = (None, True, False, 0, 1, -1, 0.5, float("nan"), float("inf"), 10**400, "", " ", "q", "user", "assistant")
LEAVES += ("gpt", "human", "function_call", "text", "image_url", "{", "[]", '{"name": "f"}', "\ud800", "a b\nc", "é")


def junk(draw, depth=4):
    """A random JSON value that is made of the words that mean something here."""
    kind = draw.random()
    if depth == 0 or kind < 0.3:
        return draw.choice(LEAVES)
    if kind < 0.6:
        return [junk(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(KEYS): junk(draw, depth - 1) for _ in range(draw.randrange(6))}


def damaged(draw):
    """A good row with one value somewhere in it replaced."""
    row = copy.deepcopy(draw.choice(GOOD))
    place = row
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.3:
            place[draw.choice(KEYS) if isinstance(place, dict) and draw.random() < 0.3 else key] = junk(draw, 2)
            return row
        place = place[key]


GOOD = [
    *ROWS[:1],
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}], "system": "s"},
    {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]},
    {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "completion": "a", "label": True},
    {"question": "q", "completions": ["a", [{"role": "assistant", "content": "b"}]], "scores": [1, 2]},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "function_call": {"name": "f"}}],
     "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}},
]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, pytest.param(range(2, 60), marks=pytest.mark.slow)])
def test_junk_is_a_users_mistake_with_its_line_or_records_in_the_normal_form(tmp_path, seed):
    for number in [seed] if isinstance(seed, int) else seed:
        draw = random.Random(number)
        rows = [damaged(draw) if draw.random() < 0.7 else junk(draw) for _ in range(200)]
        path = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for kind, reader in READERS.items():
            notes = []
            check(kind, reader(path, on_error="skip", note=notes.append))
            assert "of 200 records cannot be used and are left out" in notes[0]
            assert f"{path}:" in notes[0]
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        place = draw.randrange(len(text))
        flipped = text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :]
        for name, cut in (("b.jsonl", flipped), ("c", text[place:])):
            broken = write(tmp_path, name, cut)
            try:
                check("records", read_records(broken, on_error="skip", note=notes.append))
            except UserError as error:  # whatever the damage made of the file as a whole
                assert str(broken) in str(error)


READERS = {
    "records": read_records,
    "prompts": read_prompts,
    "pairs": lambda path, **settings: read_preferences(path, "pairs", **settings),
    "unpaired": lambda path, **settings: read_preferences(path, "unpaired", **settings),
}


def check(kind, records):
    """What every record holds, whatever its row was."""
    fields = {"records": ("messages",), "prompts": ("prompt",)}
    fields |= {"pairs": ("prompt", "chosen", "rejected"), "unpaired": ("prompt", "completion")}
    for record in records:
        names = fields[kind] if kind != "records" or "messages" in record else ("prompt", "completion")
        for name in names:
            side = record[name]
            json.dumps(side, ensure_ascii=False).encode()
            assert isinstance(side, str) or all(
                json.dumps(message.get("tool_calls"), allow_nan=False)
                and message["role"] in ("system", "developer", "user", "assistant", "tool")
                and (isinstance(message.get("content"), str) or message.get("tool_calls"))
                and message.get("train", False) is False
                for message in side
            )
        assert kind not in ("pairs", "unpaired") or len({type(record[name]) for name in names}) == 1
        assert record.get("tools", [0])
