"""A folder of adapters that is looked at again and again, over an engine that runs."""

import shutil
import time

import pytest

import jlora
from jlora import hub
from jlora.serve import Engine, Limits
from jlora.serve.folder import Folder


@pytest.fixture(scope="module")
def engine(loaded, make_bank):
    model, _, tokenizer = loaded
    engine = Engine(model, make_bank(places=5), tokenizer, Limits(rows=1, length=64, chunk=32))
    engine.start()
    yield engine
    engine.stop(drain=False)


@pytest.fixture
def watched(engine, make_adapter, tmp_path):
    """(the folder, which holds an adapter "new", and the notes); the engine has two free places."""
    jlora.save_adapter(tmp_path / "new", make_adapter(5))
    notes = []
    before = engine.adapters
    yield Folder(tmp_path, engine, source="tiny", taken=("tiny",), note=notes.append, done={}), notes
    for name in set(engine.adapters) - set(before):
        engine.remove_adapter(name).result()


def look(folder, times=2):
    for _ in range(times):
        folder.scan()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_is_not_whole_or_not_meant_is_left_alone(watched, engine):
    folder, notes = watched
    shutil.copytree(folder.path / "new", folder.path / ".new.1f2e")
    (folder.path / "notes").mkdir()
    look(folder, 1)
    assert "new" not in engine.adapters
    look(folder)
    assert notes == ["adapter new: added"]


def test_one_without_a_place_is_added_when_there_is_one(watched, engine, make_adapter):
    folder, notes = watched
    for name in ("guest", "another"):
        engine.put_adapter(name, make_adapter(6)).result()
    look(folder, 4)
    assert notes == ["adapter new: not added yet: 5 places, none of them free: remove one first"]
    engine.remove_adapter("guest").result()
    look(folder, 1)
    assert notes[1:] == ["adapter new: added"]


def test_trouble_with_one_does_not_end_the_watch_over_others(watched, engine, monkeypatch):
    folder, notes = watched
    shutil.copytree(folder.path / "new", folder.path / "bad")
    load = hub.load_adapter

    def failing(params, path, source):
        if path.name == "bad":
            raise RuntimeError("out of luck")
        return load(params, path, source)

    monkeypatch.setattr(hub, "load_adapter", failing)
    look(folder, 3)
    assert notes == ["adapter bad: not added: RuntimeError: out of luck", "adapter new: added"]


def test_a_folder_that_is_away_for_a_while_takes_nothing_with_it(watched, engine, monkeypatch):
    folder, notes = watched
    look(folder)
    with monkeypatch.context() as patched:
        looked = []

        def away(path):
            looked.append(path)
            raise OSError("too many open files")

        patched.setattr("jlora.serve.folder.subfolders", away)
        folder.watch(0.01)
        until(lambda: len(looked) > 3)
    jlora.save_adapter(folder.path / "later", jlora.load_adapter(engine.base, folder.path / "new"))
    until(lambda: len(notes) == 3)
    folder.stop()
    told = f"adapters: {folder.path} cannot be read, what was there is served: too many open files"
    assert notes == ["adapter new: added", told, "adapter later: added"]


def test_a_folder_that_is_renamed_and_back_is_served_all_the_time(watched, engine):
    folder, notes = watched
    look(folder)
    (folder.path / "new").rename(folder.path / ".old")
    look(folder, 1)
    (folder.path / ".old").rename(folder.path / "new")  # as when one is replaced by another
    look(folder, 3)
    assert notes == ["adapter new: added"]
