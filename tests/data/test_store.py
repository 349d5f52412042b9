"""Documents in flat arrays: the same in memory and in files, and none lost when the disk is full."""

import datetime
import errno

import numpy as np
import pytest

from jlora.data import Example, Examples, Item, Items, Writer, collate_items, plan_items


def documents(count=7):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 40, count)
    return [Example(random.integers(0, 99, n).astype(np.int32), random.random(n) < 0.5) for n in lengths]


def written(given, folder=None, fail=lambda error: None):
    writer = Writer(folder, fail)
    for one in given:
        writer.add(Item((one,)))
    return writer.finish().examples


def check(found: Examples, given):
    assert found.lengths.tolist() == [len(one.tokens) for one in given]
    for one, other in zip(found, given, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.trained, other.trained)


@pytest.mark.parametrize("kept", [False, True])
def test_what_was_added_is_there_in_order(tmp_path, kept):
    given = documents()
    found = written(given, tmp_path / "new" / "one" if kept else None)
    check(found, given)
    check(written(reversed(given)), given[::-1])
    np.testing.assert_array_equal(found[-1].tokens, given[-1].tokens)
    assert [len(one.tokens) for one in found[1:3]] == [len(one.tokens) for one in given[1:3]]
    assert found.checksum == written(given).checksum != written(given[::-1]).checksum
    with pytest.raises(IndexError):
        found[len(given)]


class Full:
    """A file on a disk that is soon full; it writes what still fits."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def write(self, content):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self.stream.write(content[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.mark.parametrize("room", [0, 50, 51, 300])
@pytest.mark.parametrize("name", ["tokens", "trained"])
def test_a_full_disk_loses_nothing(tmp_path, room, name):
    given, errors = documents(30), []
    writer = Writer(tmp_path / "one", errors.append)
    writer._streams[name] = Full(writer._streams[name], room)
    for one in given:
        writer.add(Item((one,)))
    check(writer.finish().examples, given)
    assert [error.errno for error in errors] == [errno.ENOSPC]
    assert writer.folder is None


@pytest.mark.parametrize("room", [None, 100])
def test_records_are_kept_with_their_items(tmp_path, room):
    records, errors = [{"prompt": "é", "n": 1.5}, {"m": [{"k": None}]}, {"x": "y" * 50}, {}], []
    dated = [*records[:2], {"day": datetime.date(2026, 1, 2)}, records[3]]
    for given, said in ((records, []), (dated, ["Object of type date is not JSON serializable"])):
        writer = Writer(tmp_path / said[0] if said else tmp_path / "one", errors.append)
        if room:
            writer._streams["records"] = Full(writer._streams["records"], 30)
            said = ["No space left on device"]
        for one, record in zip(documents(4), given, strict=True):
            writer.add(Item((one,), record=record))
        items = writer.finish()
        check(items.examples, documents(4))
        assert list(items.records) == given
        assert items.records[-3:-1] == given[1:3]
        assert [said[0] in str(error) for error in errors] == [True] * len(said)
        assert (writer.folder is None) == bool(said)
        errors.clear()


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    errors = []
    check(written(documents(), tmp_path / "file" / "one", errors.append), documents())
    assert len(errors) == 1


def test_items_that_are_made_when_looked_at_are_planned_and_collated_as_others():
    given = documents(40)
    lazy, items = Items(written(given)), [Item((one,)) for one in given]
    settings = dict(seq_len=64, batch_size=2, packing=True, epochs=1)
    steps = plan_items(lazy, **settings)
    assert steps == plan_items(items, **settings)
    for name, array in collate_items(items, steps[0]).items():
        np.testing.assert_array_equal(collate_items(lazy, steps[0])[name], array)
