"""Encoded records on disk: equal to those made anew, used only where they belong, and never needed."""

import json
import shutil

import numpy as np
import pytest

from jlora.data import cached, encode, read_records
from jlora.data.cache import FILES
from jlora.data.store import Writer


def chat(number):
    question = {"role": "user", "content": f"{number} + {number}?"}
    return {"messages": [question, {"role": "assistant", "content": str(2 * number)}]}


class Case:
    """A file of records, and how it is encoded; it counts how often that was done."""

    def __init__(self, folder, tokenizer):
        self.path, self.root, self.tokenizer = folder / "a.jsonl", folder / "cache", tokenizer
        self.write(range(20))
        self.made, self.notes = 0, []

    def write(self, numbers):
        self.path.write_text("\n".join(json.dumps(chat(number)) for number in numbers))

    def run(self, tokenizer=None, root="", seq_len=99):
        tokenizer = tokenizer or self.tokenizer
        self.notes = []

        def make(writer, note):
            self.made += 1
            records = read_records(self.path)
            note(f"{len(records)} lines")
            return encode(records, tokenizer, seq_len=seq_len, note=note, writer=writer)

        root = self.root if root == "" else root
        return cached(root, self.path, tokenizer, {"seq_len": seq_len}, make, self.notes.append, least=0)

    @property
    def folders(self):
        return sorted(self.root.iterdir())


@pytest.fixture
def case(tmp_path, tokenizer):
    return Case(tmp_path, tokenizer)


def check_same(found, expected):
    (examples, report), (others, other_report) = found, expected
    np.testing.assert_array_equal(examples.bounds, others.bounds)
    for name in examples.columns:
        np.testing.assert_array_equal(examples.columns[name], others.columns[name])
    assert examples.checksum == others.checksum
    assert list(report.kept) == list(other_report.kept)
    assert (report.tokens, report.trained_tokens, report.notes) == (
        other_report.tokens,
        other_report.trained_tokens,
        other_report.notes,
    )


def test_the_second_run_reads_what_the_first_one_kept(case):
    first = case.run()
    assert case.notes == ["20 lines"]
    said = case.notes
    second = case.run()
    assert case.made == 1
    assert case.notes == [*said, f"the tokens come from {case.folders[0]}"]
    check_same(second, first)
    check_same(case.run(root=None), first)
    assert not list(case.root.glob(".*"))
    assert not second[0].columns["tokens"].flags.writeable


def test_other_data_settings_or_tokenizers_are_encoded_anew(case, make_tokenizer, tokenizer):
    case.run()
    case.run(seq_len=98)
    assert "are of another settings: the data are encoded again" in case.notes[0]
    other = make_tokenizer(tokenizer.chat_template.replace("Be brief.", "Be short."), "<|im_end|>")
    examples, _ = case.run(other)
    assert "are of another tokenizer" in case.notes[0]
    assert "Be short." in other.decode(examples[0].tokens)
    case.write(range(21))
    assert len(case.run()[0]) == 21
    assert not any("again" in note for note in case.notes)
    assert (case.made, len(case.folders)) == (4, 4)


@pytest.mark.parametrize("name", [*FILES, "index.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_a_damaged_folder_is_made_anew(case, name, how):
    expected = case.run(root=None)
    case.run()
    path = case.folders[0] / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if how == "cut" else content[:9] + bytes([content[9] ^ 1]) + content[10:])
    check_same(case.run(), expected)
    if (name, how) != ("index.json", "changed"):
        assert "cannot be used" in case.notes[0]
        assert case.made == 3
    case.run()
    assert "the tokens come from" in case.notes[-1]


def test_a_folder_with_another_tokenizers_tokens_is_made_anew(case, make_tokenizer):
    expected = case.run()
    case.run(make_tokenizer("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "<|im_end|>"))
    ours, other = sorted(case.folders, key=lambda path: path.stat().st_mtime_ns)
    shutil.rmtree(ours)
    other.rename(ours)
    check_same(case.run(), expected)
    assert f"{ours} cannot be used (they are of another tokenizer): the data are encoded again" in case.notes[0]


def test_a_disk_without_room_is_said_and_the_run_goes_on(case, monkeypatch):
    expected = case.run(root=None)

    def full(self, name, content):
        if self.folder is not None and self._sizes[-1] > 300:
            raise OSError(28, "No space left on device")
        write(self, name, content)

    write = Writer._write
    monkeypatch.setattr(Writer, "_write", full)
    check_same(case.run(), expected)
    assert case.notes[-1].startswith("the tokens cannot be kept in")
    assert case.notes[-1].endswith("No space left on device): the run goes on without a cache")
    assert not case.folders
    monkeypatch.undo()
    check_same(case.run(root=case.path / "cache"), expected)
    assert any("the run goes on without a cache" in note for note in case.notes)


def test_what_fails_leaves_nothing_behind(case):
    case.path.write_text("3")
    with pytest.raises(ValueError, match="cannot be used"):
        case.run()
    assert not case.folders


def test_little_data_and_tokenizers_that_cannot_be_told_apart_are_not_kept(case):
    def make(writer, note):
        assert writer.folder is None
        return encode([chat(1)], case.tokenizer, seq_len=99, writer=writer)

    for tokenizer, least in ((case.tokenizer, 2**20), (object(), 0)):
        examples, _ = cached(case.root, case.path, tokenizer, {}, make, print, least=least)
        assert len(examples) == 1
    assert not case.root.exists()
