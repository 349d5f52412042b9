"""What fine-tuning cost: likelihoods by transformers, intervals by hand, and the command around them."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

import jlora
from jlora import data, hub, lora, tree
from jlora.cli.main import main
from jlora.train.evaluation import forgetting


@pytest.fixture(scope="module")
def loaded(model_folder):
    model, params = hub.load(model_folder, dtype="float32")
    frozen, trainable = lora.split(lora.init(params, jlora.LoraConfig(r=3), jax.random.key(0)))
    trainable = tree.map_with_path(lambda path, leaf: leaf + 0.05 if path.endswith("lora_b") else leaf, trainable)
    return model, lora.combine(frozen, trainable), hub.load_tokenizer(model_folder)


QUESTIONS = [
    {"question": "two?", "choices": ["2", "two twos", "3"], "answer": 0},
    {"question": "a longer one, with more words?", "choices": ["yes", "no"], "answer": 1},
]


def log_probs(model, tokenizer, prompt, text, *, end=False):
    """By transformers: of each token of `text` after `prompt`, and of the end of the text where asked for."""
    before = tokenizer(prompt)["input_ids"]
    tokens = tokenizer(prompt + text)["input_ids"] + [tokenizer.eos_token_id] * end
    logits = model(torch.tensor([tokens])).logits[0].detach().double()
    scores = torch.log_softmax(logits[:-1], dim=-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    return scores.numpy()[max(len(before), 1) - 1 :]


def test_the_likeliest_choice_is_the_answer(loaded, model_folder):
    model, params, tokenizer = loaded
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    found = forgetting.answers(model, lora.strip(params), tokenizer, QUESTIONS, batch_size=4, seq_len=128)
    for right, one in zip(found, QUESTIONS, strict=True):
        question = f"Question: {one['question']}\nAnswer:"
        scores = [log_probs(theirs, tokenizer, question, f" {choice}").sum() for choice in one["choices"]]
        assert right == (int(np.argmax(scores)) == one["answer"])
    flipped = [one | {"answer": (one["answer"] + 1) % len(one["choices"])} for one in QUESTIONS]
    assert not (found & forgetting.answers(model, lora.strip(params), tokenizer, flipped)).any()


def test_the_end_of_a_text_counts_on_the_task_alone(loaded, model_folder):
    model, params, tokenizer = loaded
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    records = [{"prompt": "1", "completion": " then 2"}, {"prompt": "", "completion": "a text"}]
    sets = dict(task=records, general=records, questions=QUESTIONS)
    found = {
        change.measure: change for change in forgetting.compare(model, lora.strip(params), params, tokenizer, **sets)
    }
    [row] = forgetting.sweep(model, params, tokenizer, [0], **sets)
    for measure, end in (("task loss", True), ("general loss", False)):
        scores = [log_probs(theirs, tokenizer, *one.values(), end=end) for one in records]
        expected = -np.concatenate(scores).mean()
        assert found[measure].before == pytest.approx(expected, rel=1e-5)
        assert row[measure] == pytest.approx(expected, rel=1e-5)
    texts = [text for one in QUESTIONS for text in one["choices"]]
    for example, text in zip(forgetting.encode_choices(tokenizer, QUESTIONS, seq_len=64), texts, strict=True):
        assert tokenizer.decode(example.tokens[example.trained]) == f" {text}"


def test_changes_come_with_an_interval_that_chance_explains(loaded):
    model, params, tokenizer = loaded
    records = [{"prompt": f"{i}", "completion": f" then {i + 1}"} for i in range(12)]
    base = lora.strip(params)
    [same] = forgetting.compare(model, base, params, tokenizer, general=records)
    [task] = forgetting.compare_scores([{"hit": 0.0}, {"hit": 1.0}] * 8, [{"hit": 1.0}] * 16)
    assert (same.measure, task.measure) == ("general loss", "hit")
    sums = [forgetting.record_sums(model, one, tokenizer, records, end=False) for one in (base, params)]
    for found, one in zip((same.before, same.after), sums, strict=True):
        assert found == pytest.approx(one.loss.sum() / one.tokens.sum())
    assert same.low < same.after - same.before < same.high
    assert (task.before, task.after) == (0.5, 1.0) and 0.2 < task.low < 0.5 < task.high < 0.8 and task.is_clear
    nothing = forgetting.compare(model, base, base, tokenizer, general=records)[0]
    assert (nothing.low, nothing.high) == (0, 0) and not nothing.is_clear


def test_what_does_not_fit_counts_for_neither_model_and_is_counted(loaded):
    model, params, tokenizer = loaded
    records = [{"prompt": f"{i}", "completion": f" then {i + 1}"} for i in range(4)]
    long = {"prompt": "x" * 99, "completion": "y"}
    [fewer] = forgetting.compare(model, lora.strip(params), params, tokenizer, task=records, seq_len=64)
    [more] = forgetting.compare(model, lora.strip(params), params, tokenizer, task=[long, *records], seq_len=64)
    assert (more.n, more.dropped) == (4, 1)
    np.testing.assert_allclose(more[1:5], fewer[1:5], rtol=1e-6)
    too_long = [{"question": "x" * 99, "choices": ["a", "b"], "answer": 1}]
    for questions in (too_long, [*QUESTIONS, *too_long]):
        with pytest.raises(ValueError, match=rf"seq_len=64; .*\n  question {len(questions)}: 119 tokens with its"):
            forgetting.compare(model, {}, {}, tokenizer, task=records, questions=questions, seq_len=64)
        with pytest.raises(ValueError, match=rf"question {len(questions)}: 119 tokens"):
            forgetting.answers(model, {}, tokenizer, questions, seq_len=64)
    assert (
        forgetting.sweep(
            model, params, tokenizer, [0], task=[long, *records], general=records, questions=QUESTIONS, seq_len=64
        )[0]["dropped"]
        == 1
    )


def test_scores_are_compared_over_the_records_that_have_them():
    before = [{"a": 1.0}, {"a": 0.0, "b": 2.0}, {"b": 4.0, "c": 1.0}]
    after = [{"a": 1.0, "b": 3.0}, {"a": 1.0}, {"b": 6.0}]
    found = {change.measure: change for change in forgetting.compare_scores(before, after)}
    assert set(found) == {"a", "b"}
    assert (found["a"].before, found["a"].after, found["a"].n, found["a"].dropped) == (0.5, 1, 2, 1)
    assert (found["b"].before, found["b"].after, found["b"].n, found["b"].dropped) == (4, 6, 1, 2)


def test_one_record_and_what_is_no_number_have_no_interval_and_are_never_clear():
    [one] = forgetting.compare_scores([{"a": 0.0}], [{"a": 1.0}])
    two, *_ = forgetting.compare_scores([{"a": 0.0}] * 2, [{"a": 1.0}] * 2)
    assert (one.before, one.after, one.n) == (0, 1, 1) and not one.is_clear and two.is_clear
    for bad in (math.nan, math.inf):
        [lost] = forgetting.compare_scores([{"a": 0.0}] * 3, [{"a": 1.0}, {"a": bad}, {"a": 1.0}])
        assert not math.isfinite(lost.after) and not lost.is_clear
        assert math.isnan(lost.low) and math.isnan(lost.high)


def test_a_question_without_a_likeliest_choice_is_not_answered(loaded):
    model, params, tokenizer = loaded
    broken = tree.map_with_path(lambda path, leaf: leaf * math.nan if path.endswith("embedding") else leaf, params)
    first = [one | {"answer": 0} for one in QUESTIONS]
    assert not forgetting.answers(model, broken, tokenizer, first).any()


def test_a_number_that_some_scales_lack_leaves_a_gap(tmp_path, monkeypatch):
    rows = [{"scale": 0.0, "dropped": 0.0, "a": 1.0}, {"scale": 0.5, "b": 2.0, "a": 3.0}, {"scale": 1.0, "b": 4.0}]
    drawn = []
    monkeypatch.setattr(forgetting, "save_figure", lambda figure, path: drawn.extend(figure.axes))
    forgetting.draw_sweep(tmp_path / "sweep.png", rows)
    assert [axis.get_title(loc="left") for axis in drawn] == ["a", "b"]
    curves = [axis.lines[0].get_ydata() for axis in drawn]
    np.testing.assert_array_equal(curves, [[1, 3, math.nan], [math.nan, 2, 4]])


def test_a_scale_of_0_is_the_base_and_1_the_adapter(loaded):
    model, params, tokenizer = loaded
    records = [{"prompt": f"{i}", "completion": f" then {i + 1}"} for i in range(5)]
    rows = forgetting.sweep(model, params, tokenizer, [0, 0.5, 1], task=records, general=records, questions=QUESTIONS)
    base, tuned = (forgetting.record_sums(model, one, tokenizer, records) for one in (lora.strip(params), params))
    assert rows[0]["task loss"] == pytest.approx(base.loss.sum() / base.tokens.sum(), rel=1e-6)
    assert rows[2]["task loss"] == pytest.approx(tuned.loss.sum() / tuned.tokens.sum(), rel=1e-5)
    assert len({row["general loss"] for row in rows}) == 3
    with pytest.raises(ValueError, match="only updates that are added to the base have a scale"):
        lora.scaled({"q": {"kernel": np.ones((2, 2)), "lora_magnitude": np.ones(2)}}, 0.5)


def test_the_sets_that_come_with_jlora_hold():
    questions = forgetting.read_questions(forgetting.QUESTIONS)
    assert len(questions) == 48 and len({one["question"] for one in questions}) == 48
    assert all(len(one["choices"]) == len(set(one["choices"])) == 4 for one in questions)
    assert len(data.read_records(str(forgetting.GENERAL))) == 16


def test_questions_that_are_none_are_all_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question": "a", "choices": ["x"], "answer": 1}\nno\n{"question": "b", "choices": ["x"], "answer": 0}\n'
    )
    with pytest.raises(ValueError) as error:
        forgetting.read_questions(path)
    assert f"{path}:1: expected question" in str(error.value) and f"{path}:2" in str(error.value)
    assert f"{path}:3" not in str(error.value)


def test_the_command_compares_and_sweeps(loaded, model_folder, tmp_path, capsys):
    _, params, _ = loaded
    hub.save_adapter(tmp_path / "adapter", params, base=str(model_folder))
    task = [{"prompt": "1", "completion": " 2"}, {"prompt": "x" * 64, "completion": " 3"}]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(one) + "\n" for one in task))
    (tmp_path / "metric.py").write_text("def metric(record, text):\n    return {record['prompt'][0]: 1.0}\n")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    common = ["eval", f"--model={model_folder}", f"--data={tmp_path / 'task.jsonl'}", "--seq_len=64", "--json"]
    sets = [f"--general={tmp_path / 'task.jsonl'}", f"--questions={tmp_path / 'q.jsonl'}", "--max_new_tokens=2"]
    adapter = f"--adapter={tmp_path / 'adapter'}"
    assert main([*common, adapter, "--against=base", *sets, f"--metric={tmp_path / 'metric.py'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"task loss", "general loss", "questions right", "exact_match", "1", "x"}
    assert [found[name]["n"] for name in ("task loss", "exact_match", "x")] == [1, 2, 1]
    assert found["task loss"]["before"] != found["task loss"]["after"]
    shutil.copytree(model_folder, tmp_path / "same")
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    (tmp_path / "same" / "config.json").write_text(json.dumps(config | {"eos_token_id": 3, "use_cache": False}))
    assert main([*common, f"--against={tmp_path / 'same'}", *sets, "--loss_only"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["general loss"]["before"] == found["general loss"]["after"]
    assert found["task loss"]["low"] is found["task loss"]["high"] is None  # one record within seq_len
    plot = tmp_path / "sweep.png"
    assert main([*common, adapter, "--scales", "0", "1", f"--plot={plot}", *sets, "--loss_only"]) == 0
    rows = strict_json(capsys.readouterr().out)
    assert [row["scale"] for row in rows] == [0, 1] and plot.read_bytes().startswith(b"\x89PNG")
    assert math.isfinite(rows[1]["task loss"])
    for arguments, words in (
        (["--against=base"], "needs --adapter"),
        ([adapter, "--general=x.jsonl"], "have no effect without --against or --scales"),
        ([adapter, "--scales", "1", "--against=base"], "cannot be combined"),
    ):
        assert main([*common, *arguments]) == 2
        assert words in capsys.readouterr().err


def strict_json(text):
    """Values as every reader of JSON reads them: NaN is none."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_tables_leave_out_what_is_lacking_and_mark_what_is_no_number(
    loaded, model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    _, params, _ = loaded
    hub.save_adapter(tmp_path / "adapter", params, base=str(model_folder))
    records = [{"prompt": f"{i}", "completion": f" {i}"} for i in range(3)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (tmp_path / "metric.py").write_text(
        "calls = []\n\n\n"
        "def metric(record, text):\n"
        "    calls.append(text)\n"
        "    rare = {'rare': 0.25} if len(calls) in (4, 5) else {}\n"
        "    return {**rare, 'lost': float('nan'), 'kept': 0.75}\n"
    )
    common = ["eval", f"--model={model_folder}", f"--data={tmp_path / 'task.jsonl'}", "--max_new_tokens=2"]
    common += [f"--adapter={tmp_path / 'adapter'}", f"--metric={tmp_path / 'metric.py'}"]
    sets = [f"--general={tmp_path / 'task.jsonl'}", f"--questions={tmp_path / 'q.jsonl'}"]

    def table(*arguments):
        assert main([*common, *sets, *arguments]) == 0
        lines = [
            [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
            for line in capsys.readouterr().out.splitlines()
            if line[0] in "│┃"
        ]
        return {line[0]: line[1:] for line in lines}

    def broken(*arguments):
        raise OSError("no room")

    # Records 1 to 3 are answered with the scale 0, which has no rare number then.
    found = table("--scales", "0", "1")
    assert found["scale"][-4:] == ["exact_match", "lost", "kept", "rare"]
    assert (found["0"][-3:], found["1"][-3:]) == (["nan", "0.75", ""], ["nan", "0.75", "0.25"])
    found = table("--against=base")
    assert found["lost"][:3] == ["nan", "nan", "+nan"] and found["lost"][4] == "not finite"
    assert "rare" not in found and found["kept"][4] == "within chance"
    for arguments in (
        ["--against=base", *sets],
        ["--scales", "0", "1", *sets],
        [f"--answers={tmp_path / 'out.jsonl'}"],
    ):
        assert main([*common, *arguments, "--json"]) == 0
        strict_json(capsys.readouterr().out)
    answers = [strict_json(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["lost"] for answer in answers] == [None] * 3
    # The numbers are shown before they are drawn.
    monkeypatch.setattr(forgetting, "draw_sweep", broken)
    with pytest.raises(OSError, match="no room"):
        main([*common, "--scales", "0", *sets, f"--plot={tmp_path / 'plot.png'}", "--json"])
    assert strict_json(capsys.readouterr().out)[0]["kept"] == 0.75
