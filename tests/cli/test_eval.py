import json
import math
import pathlib
import sys

import numpy as np
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


def test_several_devices_measure_what_one_does(model_folder, data_file, capsys):
    common = [f"--model={model_folder}", f"--data={data_file}", "--batch_size=3"]
    spread, alone = (numbers(capsys, *common, *more) for more in (["--mesh.data=2", "--mesh.tensor=4"], []))
    assert spread == pytest.approx(alone, rel=1e-4)


def test_a_function_of_all_texts_says_something_of_each(model_folder, data_file, tmp_path, capsys):
    """As in train.metrics; None leaves a text out."""
    (tmp_path / "own.py").write_text(
        "def told(texts, targets, messages):\n"
        "    lengths = [len(text) if number else None for number, text in enumerate(texts)]\n"
        "    return {'length': lengths, 'asked': len(messages), 'same': [x == y for x, y in zip(texts, targets)]}\n"
        "def greedy(texts, prices): ...\n"
        "def broken(texts): return texts\n"
        "def taken(texts): return {'loss': 1.0}\n"
    )
    answers, own = tmp_path / "answers.jsonl", tmp_path / "own.py"
    common = [f"--model={model_folder}", f"--data={data_file}", "--max_new_tokens=4"]
    found = numbers(capsys, *common, f"--metric={own}:told", f"--answers={answers}")
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    lengths = [len(answer["text"]) for answer in written]
    assert found["length"] == pytest.approx(np.mean(lengths[1:])) and found["asked"] == len(written)
    assert "length" not in written[0] and [answer["length"] for answer in written[1:]] == lengths[1:]
    assert found["same"] == np.mean([answer["same"] for answer in written])
    for name, message in [
        ("greedy", "--metric: {}:greedy wants ['prices'], expected parameters among"),
        ("broken", "expected a number, a list of one number or None for each of"),
        ("taken", "returned the names ['loss'], expected names other than"),
        ("missing", "missing"),
    ]:
        assert main(["eval", *common, "--json", f"--metric={own}:{name}"]) == 2
        said = capsys.readouterr()
        assert message.format(own) in said.err, said.err
        assert ('"perplexity"' in said.out) == (name in ("broken", "taken"))  # what was computed is kept


def test_a_metric_that_fails_is_named_with_its_line_and_what_was_computed_is_kept(
    model_folder, data_file, tmp_path, capsys
):
    metric, answers = tmp_path / "metric.py", tmp_path / "answers.jsonl"
    metric.write_text(
        "def metric(record, text):\n    found = {'4+4=': 1.0}\n"
        "    return {'right': found[record['messages'][0]['content']]}\n"
    )
    common = ["eval", "--max_new_tokens=3", "--seq_len=32", f"--model={model_folder}", f"--data={data_file}"]
    assert main([*common, "--json", f"--metric={metric}", f"--answers={answers}"]) == 2
    said = capsys.readouterr()
    assert f"record 1: {metric}, line 3: KeyError: '0+0='" in said.err and "... and 8 more of this kind" in said.err
    assert json.loads(said.out)["right"] == 1.0 and json.loads(said.out)["loss"] > 0
    kept = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(kept) == 12 and [answer["target"] for answer in kept if "right" in answer] == ["8"]


@pytest.mark.parametrize("fault", ["sys.exit(3)", "raise BlockingIOError()", "raise KeyError('x')", "import nothing"])
def test_whatever_a_file_of_the_users_raises_is_named_with_its_line(data_file, model_folder, tmp_path, capsys, fault):
    (tmp_path / "metric.py").write_text(f"import sys\n{fault}\n")
    arguments = [f"--model={model_folder}", f"--data={data_file}", f"--metric={tmp_path / 'metric.py'}"]
    assert main(["eval", *arguments]) == 2
    assert f"jlora: {tmp_path / 'metric.py'}, line 2: " in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("nosuch"), ValueError("nosuch"), FileNotFoundError("nosuch")])
def test_faults_of_jloras_own_are_tracebacks(data_file, model_folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("jlora.cli.eval.evaluate", fail)
    with pytest.raises(type(error), match="nosuch"):  # which ends the process with a traceback and exit 1
        main(["eval", "--seq_len=32", f"--model={model_folder}", f"--data={data_file}"])


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


def test_what_is_wrong_is_said_before_the_model_is_loaded(data_file, tmp_path, capsys, monkeypatch):
    bad, kept = tmp_path / "bad.jsonl", tmp_path / "kept.jsonl"
    bad.write_text("no\n")
    kept.write_text("kept")
    (tmp_path / "metric.py").write_text(METRIC)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    pairs = [f"--data={tmp_path / 'pairs.jsonl'}", "--pairs"]
    sweep, against = ["--adapter=gone", "--scales", "1"], ["--adapter=gone", "--against=base"]
    gone = tmp_path / "gone" / "file"

    def check(arguments, words):
        capsys.readouterr()
        assert main(["eval", f"--model={tmp_path / 'none'}", f"--data={data_file}", *arguments]) == 2
        assert words in capsys.readouterr().err

    check(["--loss_only", f"--answers={kept}"], "--answers has no effect with --loss_only")
    check(["--loss_only", f"--metric={tmp_path / 'metric.py'}"], "--metric has no effect with --loss_only")
    check(["--metric=exact_match"], "--metric=exact_match is measured without the option: leave it out")
    check([*pairs, "--loss_only"], "--loss_only has no effect with --pairs")
    check([f"--answers={gone}"], f"--answers={gone}: found no folder {gone.parent}")
    for mode in (pairs, sweep):
        check([*mode, f"--plot={gone}"], f"--plot={gone}: found no folder {gone.parent}")
        check([*mode, f"--plot={tmp_path}"], f"--plot={tmp_path}: found a folder, expected a file")
    for mode in (against, sweep):
        check([*mode, f"--general={bad}"], f"{bad}")
        check([*mode, f"--questions={bad}"], f"{bad}:1: found 'no', expected one line of JSON")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setitem(sys.modules, "matplotlib", None)
        for mode in (pairs, sweep):
            check([*mode, f"--plot={tmp_path / 'plot.png'}"], "pip install 'jlora[plots]'")
    assert kept.read_text() == "kept"


def test_without_json_it_is_a_table(model_folder, data_file, capsys):
    assert main(["eval", f"--model={model_folder}", f"--data={data_file}", "--loss_only"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_records_that_cannot_be_used_may_be_left_out(model_folder, data_file, tmp_path, capsys):
    lines = pathlib.Path(data_file).read_text().splitlines(keepends=True)
    path = tmp_path / "some.jsonl"
    path.write_text("".join(["{\n", *lines[:3], '{"prompt": "a"}\n', "[\n", lines[3]]))
    common = ["eval", f"--model={model_folder}", f"--data={path}", "--loss_only", "--json", "--seq_len=32"]
    assert main(common) == 2
    assert "3 of 7 records cannot be used; data.on_error" in capsys.readouterr().err
    assert main([*common, "--on_error=skip"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["n"] == 4
    assert "3 of 7 records cannot be used and are left out" in said.err
    assert f"{path}:5: found the fields ['prompt'] without completion" in said.err
