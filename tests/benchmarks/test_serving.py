"""The benchmark of the server, dry: a tiny model, a few clients, a second or two."""

import importlib.util
import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("serving", FOLDER / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("record", None)


@pytest.mark.slow  # a process that serves is a minute's work of compiling
def test_both_parts_give_their_figures(serving, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving.record, "RESULTS", tmp_path)
    monkeypatch.setattr(serving.allocator, "keep_freed_pages", lambda: None)
    options = ["--rounds=1", "--new=4", "--length=320", "--minutes=0.05", "--clients=4", "--adapters=2", "--every=0.5"]
    monkeypatch.setattr(sys, "argv", ["serving.py", f"--model={model_folder}", *options])
    serving.main()
    figures = json.loads((tmp_path / "serving.json").read_text())["figures"]
    assert figures["throughput"]["ratio"] > 0
    load = figures["load"]
    assert load["lost"] == 0 and load["requests"] > 4 and load["folder_changes"] > 1
    assert load["request_seconds"]["p99"] >= load["request_seconds"]["p50"] >= load["first_text_seconds"]["p50"] > 0


def test_a_changed_answer_is_a_lost_request(serving, monkeypatch):
    class Chunk:
        def __init__(self, text):
            self.choices = [type("Choice", (), {"text": text})]
            self.usage = type("Usage", (), {"completion_tokens": 1})

    load = serving.Load("http://localhost", ["law"], 4)
    for text, lost in (("abc", 0), ("ab", 0), ("abcd", 0), ("abx", 1)):
        monkeypatch.setattr(load._client.completions, "create", lambda text=text, **_: iter([Chunk(text)]))
        load._ask_once("law", "hello", 4)
        assert len(load.lost) == lost and len(load.whole) == load.tokens


def test_prompts_share_no_beginning_with_those_of_other_rounds(serving):
    texts = [text for number in range(4) for text in serving.prompts(number, serving.ROWS)]
    assert len({text.rpartition(" ")[0][:5] for text in texts}) == len(texts)
    assert serving.prompts(2, 3) == serving.prompts(2, 3)
