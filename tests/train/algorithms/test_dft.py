"""DFT learns from what supervised fine-tuning learns from, in the same runs."""

import json

import pytest

from jlora.train import resolve, run
from jlora.train.reporting.metrics import read_metrics

ROWS = [{"prompt": f"say {i} ", "completion": "so " * (1 + i)} for i in range(4)]


@pytest.fixture
def settings(model_folder, tmp_path):
    """settings(algorithm, group={…}): a run of two steps, each on all records."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(algorithm, **groups):
        config = {
            "algorithm": algorithm,
            "model": {"path": model_folder},
            "data": {"path": str(path), "eval_path": str(path), "packing": False, "bucket": 8},
            "lora": {"r": 2, "init_lora_weights": False},
            "optim": {"learning_rate": 1e-2, "schedule": "constant"},
            "train": {"steps": 2, "batch_size": 4, "seq_len": 128, "eval_every": 1},
        }
        return {**config, **{name: config.get(name, {}) | group for name, group in groups.items()}}

    return make


def log(settings, folder):
    run(resolve(settings), folder)
    return read_metrics(folder)


@pytest.mark.slow  # the term is of single tokens, and what surrounds it is sft's
def test_packing_and_accumulation_change_nothing(settings, tmp_path):
    apart = log(settings("dft"), tmp_path / "apart")
    packed = log(settings("dft", data={"packing": True}, train={"batch_size": 1}), tmp_path / "packed")
    accumulated = log(settings("dft", train={"batch_size": 2, "grad_accum": 2}), tmp_path / "accumulated")
    for other in (packed, accumulated):
        for name in ("loss", "grad_norm", "mean_token_accuracy", "num_tokens"):
            assert [row[name] for row in other] == pytest.approx([row[name] for row in apart], rel=1e-4), name


def test_it_is_evaluated_by_likelihood_and_trains_another_way(settings, tmp_path):
    plain = log(settings("sft"), tmp_path / "sft")
    before, *dynamic = log(settings("dft", train={"eval_on_start": True}), tmp_path / "dft")
    assert plain[0].keys() == dynamic[0].keys()
    assert plain[0]["mean_token_accuracy"] == dynamic[0]["mean_token_accuracy"]
    assert 0 < dynamic[0]["loss"] < 1 / 2.718 < plain[0]["loss"]  # -p · log p is at most 1 / e
    assert before["eval_loss"] == pytest.approx(plain[0]["loss"], rel=1e-4)
    assert dynamic[1]["eval_loss"] != plain[1]["eval_loss"]


@pytest.mark.slow  # side by side, DFT is SFT's step with another term
def test_several_adapters_side_by_side(settings, tmp_path):
    alone = log(settings("dft"), tmp_path / "alone")
    run(resolve(settings("dft", adapters={"a": {}, "b": {"lora": {"r": 3}}})), tmp_path / "both")
    together = read_metrics(tmp_path / "both")
    found = [row["loss/a"] for row in together]
    assert found == pytest.approx([row["loss"] for row in alone], rel=1e-4)


def test_it_has_no_settings_of_its_own(settings):
    with pytest.raises(ValueError, match=r"dft\.alpha: unknown key"):
        resolve(settings("dft", dft={"alpha": 1.0}))
