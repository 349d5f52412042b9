"""Encoded records on disk: equal to those made anew, used only where they belong, and never needed."""

import itertools
import json
import shutil

import numpy as np
import pytest

from jlora.data import cached, encode_items, encode_preferences, read_preferences
from jlora.data.cache import FILES
from jlora.data.writer import Writer


def says(role, text):
    return [{"role": role, "content": text}]


def chat(number):
    return {"messages": says("user", f"{number} + {number}?") + says("assistant", str(2 * number))}


def pair(number):
    sides = {"chosen": says("assistant", str(2 * number)), "rejected": says("assistant", "Many.")}
    return {"prompt": says("user", f"{number} + {number}?"), "margin": number / 3} | sides


class Case:
    """A file of pairs, and how it is encoded; it counts how often that was done."""

    def __init__(self, folder, tokenizer):
        self.path, self.root, self.tokenizer = folder / "a.jsonl", folder / "cache", tokenizer
        self.write(range(20))
        self.made, self.notes = 0, []

    def write(self, numbers):
        self.path.write_text("\n".join(json.dumps(pair(number)) for number in numbers))

    def run(self, tokenizer=None, root="", seq_len=99, make=None):
        tokenizer = tokenizer or self.tokenizer
        self.notes = []

        def encoded(writer, note):
            self.made += 1
            records = read_preferences(self.path, "pairs")
            note(f"{len(records)} lines")
            return encode_preferences(records, tokenizer, seq_len=seq_len, note=note, writer=writer)

        root = self.root if root == "" else root
        return cached(root, self.path, tokenizer, {"seq_len": seq_len}, make or encoded, self.notes.append, least=0)

    @property
    def folders(self):
        return sorted(self.root.iterdir())


@pytest.fixture
def case(tmp_path, tokenizer):
    return Case(tmp_path, tokenizer)


def check_same(found, expected):
    (items, report), (other_items, other_report) = found, expected
    examples, others = items.examples, other_items.examples
    assert items.sides == other_items.sides == 2
    np.testing.assert_array_equal(examples.bounds, others.bounds)
    np.testing.assert_array_equal(items.shared, other_items.shared)
    for one, other in ((examples.columns, others.columns), (items.values, other_items.values)):
        assert one.keys() == other.keys() != set()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
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
    assert not second[0].examples.columns["tokens"].flags.writeable


def test_other_data_settings_or_tokenizers_are_encoded_anew(case, make_tokenizer, tokenizer):
    case.run()
    case.run(seq_len=98)
    assert "are of another settings: the data are encoded again" in case.notes[0]
    other = make_tokenizer(tokenizer.chat_template.replace("Be brief.", "Be short."), "<|im_end|>")
    items, _ = case.run(other)
    assert "are of another tokenizer" in case.notes[0]
    assert "Be short." in other.decode(items[0].documents[0].tokens)
    case.write(range(21))
    assert len(case.run()[0]) == 21
    assert not any("again" in note for note in case.notes)
    assert (case.made, len(case.folders)) == (4, 4)


def test_a_damaged_folder_is_made_anew(case, tmp_path):
    expected = case.run()
    [folder] = case.folders
    shutil.copytree(folder, tmp_path / "whole")
    for name, how in itertools.product([*FILES, "index.json"], ["changed", "missing", "cut"]):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        content = (folder / name).read_bytes()
        flipped = content[:-10] + bytes(byte ^ 1 for byte in content[-10:])
        # Pairs keep no records: that file is empty.
        (folder / name).write_bytes((content[:-3] if how == "cut" else flipped) or b"x")
        if how == "missing":
            (folder / name).unlink()
        with pytest.raises(Anew):
            case.run(make=anew)
        assert "cannot be used" in case.notes[0], (name, how)
    check_same(case.run(), expected)
    case.run()
    assert "the tokens come from" in case.notes[-1]


class Anew(Exception):
    """The data would be encoded again."""


def anew(writer, note):
    raise Anew


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
        if self.folder is not None and self._ends["tokens"] > 1200:
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
        return encode_items([chat(1)], case.tokenizer, seq_len=99, writer=writer)

    for tokenizer, least in ((case.tokenizer, 2**20), (object(), 0)):
        examples, _ = cached(case.root, case.path, tokenizer, {}, make, print, least=least)
        assert len(examples) == 1
    assert not case.root.exists()
