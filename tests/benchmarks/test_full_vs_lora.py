"""Full fine-tuning beside LoRA, with a tiny model: every figure of the table is there, and runs can be added to it."""

import importlib
import json
import pathlib
import sys
import types

import pytest

import jlora
from jlora.cli.main import main as command

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
FUNCTION = {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}


@pytest.fixture
def benchmark(monkeypatch, tmp_path, model_folder):
    """(arguments of the script) → its table's rows; it trains in this process, on records of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("full_vs_lora")
    records = [
        {
            "prompt": f"add {a} ",
            "completion": json.dumps({"name": "add", "arguments": {"a": a}}),
            "functions": [FUNCTION],
            "ground_truth": {"add": {"a": [a]}},
        }
        for a in range(4)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    few = {"GENERAL": {"prompt": "", "completion": "A text."}, "QUESTIONS": None}
    few["QUESTIONS"] = {"question": "1?", "choices": ["1", "2"], "answer": 0}
    for name, row in few.items():
        (tmp_path / name).write_text(2 * (json.dumps(row) + "\n"))
        monkeypatch.setattr(script.forgetting, name, tmp_path / name)
    monkeypatch.setattr(script, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(script.record, "RESULTS", tmp_path)
    in_process = types.SimpleNamespace(run=lambda words, **settings: command(words[3:]))
    monkeypatch.setattr(script, "subprocess", in_process)

    def run(*arguments):
        given = [f"--model={model_folder}", f"--data={tmp_path}", f"--work={tmp_path}", "--questions=2", *arguments]
        monkeypatch.setattr(
            sys, "argv", ["full_vs_lora.py", *given, "--config.train.seq_len=64", "--config.train.epochs=9"]
        )
        script.main()
        return json.loads((tmp_path / "full_vs_lora.json").read_text())["figures"]["rows"]

    return run


@pytest.mark.slow
def test_every_figure_is_there_and_runs_are_added(benchmark, model_folder, capsys):
    rows = benchmark("--steps=2", "--only", "LoRA")
    assert list(rows) == ["before", "LoRA"]
    lora = rows["LoRA"]
    assert lora.keys() >= {"seconds", "peak_bytes", "valid_json", "correct", "general loss", "questions right"}
    rows = benchmark("--steps=2", "--only", "full")
    assert list(rows) == ["before", "full", "LoRA"] and rows["LoRA"] == lora
    whole = jlora.tree.count(jlora.load(model_folder)[1])
    assert rows["full"]["trained_parameters"] == whole and rows["full"]["loss"] != rows["before"]["loss"]
    assert f"{whole:,}" in capsys.readouterr().out
    script = importlib.import_module("full_vs_lora")
    assert script._kept({"steps": 2}) == rows and script._kept({"steps": 3}) == {}
