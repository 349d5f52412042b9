import json
import math

import pytest

from jlora.cli.main import main

METRIC = "def metric(record, text):\n    return {'length': len(text), 'asked': len(record['messages'])}\n"


def numbers(capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", "--json", "--max_new_tokens=3", "--seq_len=32", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_loss_perplexity_and_the_metric(model_folder, data_file, tmp_path, capsys):
    (tmp_path / "metric.py").write_text(METRIC)
    found = numbers(capsys, f"--model={model_folder}", f"--data={data_file}", f"--metric={tmp_path / 'metric.py'}")
    assert found["n"] == 12
    assert found["asked"] == 2
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-5)


def test_the_adapter_is_used(model_folder, data_file, trained, capsys):
    common = (f"--model={model_folder}", f"--data={data_file}", "--loss_only")
    base, adapted = numbers(capsys, *common), numbers(capsys, *common, f"--adapter={trained / 'adapter'}")
    assert adapted["loss"] != base["loss"]
    assert "exact_match" not in base


def test_answers_are_written_one_a_record(model_folder, data_file, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    numbers(capsys, f"--model={model_folder}", f"--data={data_file}", f"--answers={path}")
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [answer["target"] for answer in answers] == [str(2 * i) for i in range(12)]


def test_without_json_it_is_a_table(model_folder, data_file, capsys):
    assert main(["eval", f"--model={model_folder}", f"--data={data_file}", "--loss_only"]) == 0
    assert "perplexity" in capsys.readouterr().out
