"""Several processes: each encodes its share, and every one gets what a single process makes of everything."""

import datetime
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from jlora.data import Example, Item, Notes, encode_items, encode_preferences, hosts, with_mismatched
from jlora.data.records import Placed
from jlora.errors import MissingFileError, UserError

PROCESSES = 3
HOST = """
import json, sys
import jax
number, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
import transformers
from jlora import data
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
found, notes = [], []

def make(writer, note):
    records = data.iterate_records(f"{folder}/a.jsonl", note=note)
    return data.encode_items(records, tokenizer, seq_len=99, note=note, writer=writer, divide=True)

def run(root):
    items, report = data.cached(root, f"{folder}/a.jsonl", tokenizer, {}, make, notes.append, least=0)
    found.append([items.examples.checksum, report.tokens, list(report.kept), items.examples.lengths.tolist()])

for root in (f"{folder}/shared", f"{folder}/shared", f"{folder}/own{number}", None):
    run(root)
open(f"{folder}/found{number}.json", "w").write(json.dumps([found, notes]))
try:
    data.require_same({"data": "same", "weather": str(number)})
except ValueError as error:
    assert "process 1: found other weather than in process 0" in str(error), error
"""


def chat(number, **more):
    answer = {"role": "assistant", "content": f"{2 * number}" + "<|im_end|>" * (number % 50 == 3)}
    question = {"role": "user", "content": "no" if number % 40 == 7 else f"{number} + {number}?" + "!" * (number % 60)}
    return {"messages": [question, answer], **more}


def single(number):
    question, answer = chat(number)["messages"]
    return {"prompt": [question], "completion": [answer], "label": number % 3 == 0}


@pytest.fixture
def refusing(make_tokenizer):
    return make_tokenizer(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}",
        "<|im_end|>",
    )


def told(encode):
    """What comes of it, and all that is told meanwhile."""
    notes = []
    try:
        items, report = encode(note=Notes(notes.append, notes.append, lambda *left_out: notes.append(left_out)))
    except UserError as error:
        return str(error), notes
    arrays = [items.examples.bounds, items.shared, *items.examples.columns.values(), *items.values.values()]
    return [values.tolist() for values in arrays], report, list(items.records), notes


def on_hosts(monkeypatch, run):
    """What `run` returns in each of several threads that take themselves for processes."""
    mine, barrier, given, found = threading.local(), threading.Barrier(PROCESSES), [b""] * PROCESSES, [None] * PROCESSES

    def exchange(content):
        given[mine.number] = content
        barrier.wait(60)
        everything = list(given)
        barrier.wait(60)
        return everything

    def work(number):
        mine.number = number
        found[number] = run()

    faked = types.SimpleNamespace(process_count=lambda: PROCESSES, process_index=lambda: mine.number)
    monkeypatch.setattr(hosts, "jax", faked)
    monkeypatch.setattr(hosts, "BLOCK", 7)
    monkeypatch.setattr(hosts.sharding, "from_all_hosts", exchange)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("count", [1, 200])
@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_every_process_gets_what_one_makes_of_everything(monkeypatch, refusing, count, on_error):
    common = dict(seq_len=64, on_error=on_error)
    records, answers = [chat(number) for number in range(count)], [single(number) for number in range(count)]
    arrange = functools.partial(with_mismatched, batch_size=4, seq_len=64)
    runs = [
        functools.partial(encode_items, records, refusing, keep=True, **common),
        functools.partial(encode_preferences, answers, refusing, "unpaired", arrange=arrange, **common),
    ]
    expected = [told(run) for run in runs]
    assert count == 1 or isinstance(expected[0][0], str) == (on_error == "raise")
    found = on_hosts(monkeypatch, lambda: [told(functools.partial(run, divide=True)) for run in runs])
    for one in found:
        assert one == expected


def test_what_one_process_alone_finds_wrong_all_raise(monkeypatch):
    def work(block):
        if 4 in block:
            raise UserError("four")
        return block

    def run():
        with pytest.raises(UserError, match="four"):
            list(hosts.divided(range(20), work))
        return True

    assert on_hosts(monkeypatch, run) == [True] * PROCESSES


@pytest.mark.slow
def test_two_processes_of_jax_encode_as_one(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(chat(number)) + "\n" for number in range(900)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOST]
    started = [
        subprocess.Popen([*command, str(number), str(port), str(tmp_path)], env=environment) for number in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    items, report = encode_items([chat(n) for n in range(900)], tokenizer, seq_len=99, note=lambda message: None)
    expected = [items.examples.checksum, report.tokens, list(report.kept), items.examples.lengths.tolist()]
    for number in range(2):
        found, notes = json.loads((tmp_path / f"found{number}.json").read_text())
        assert found == [expected] * 4
        assert sum("the tokens come from" in note for note in notes) == 1
        assert not any("cannot be kept" in note for note in notes)
    assert len(np.unique([folder.name for folder in tmp_path.glob("*/*-*")])) == 1


def test_what_processes_send_each_other_arrives_as_it_was():
    record = Placed({"messages": [{"role": "user", "content": None}], "n": (1, 2.5)}, "a.jsonl:7", 2)
    example = Example(np.arange(3, dtype=np.int32), np.array([True, False, True]))
    sent = [(0, "a.jsonl:1", ([Item((example,), {"label": 1.0}, dict(record))], {"said": None}, record))]
    [(index, place, ([item], said, again))] = hosts.unpack(hosts.pack(sent))
    assert (index, place, said) == (0, "a.jsonl:1", {"said": None})
    assert again == record and (again.place, again.source) == ("a.jsonl:7", 2)
    assert type(again["n"]) is tuple and item.record == dict(record) and item.values == {"label": 1.0}
    for name in ("tokens", "trained"):
        there, here = getattr(item.documents[0], name), getattr(example, name)
        assert there.dtype == here.dtype and there.tolist() == here.tolist()
    error = hosts.unpack(hosts.pack(MissingFileError("no")))
    assert type(error) is UserError and str(error) == "no"
    with pytest.raises(UserError, match=r"found datetime.date\(2026, 1, 2\) \(date\) in a record"):
        hosts.pack([{"day": datetime.date(2026, 1, 2)}])
