"""Adapters side by side, ranked by what their run measured."""

import io
import json

import pytest
from rich.console import Console

from jlora.train.config import swept
from jlora.train.reporting.standings import show, standings

LOG = [
    {"step": 1, "loss/r-2": 3.0, "loss/r-4": 3.0, "loss/r-8": 3.0},
    {"step": 2, "loss/r-2": 1.0, "loss/r-4": 2.0, "loss/r-8": None}
    | {"eval_loss/r-2": 2.5, "eval_loss/r-4": 2.0, "eval_loss/r-8": None}
    | {"eval_right/r-2": 0.4, "eval_right/r-4": 0.3, "eval_right/r-8": None},
    {"step": 3, "loss/r-2": 0.5, "loss/r-4": 1.0, "loss/r-8": None}
    | {"eval_loss/r-2": 2.6, "eval_loss/r-4": 2.7, "eval_loss/r-8": None}
    | {"eval_right/r-2": 0.1, "eval_right/r-4": 0.2, "eval_right/r-8": None},
]


def ranked(tmp_path, log=LOG, sweep="lora.r=2,4,8", **train):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    settings = {"model": {"path": "m"}, "data": {"path": "d", "eval_path": "e"}, "train": {"steps": 3} | train}
    config = swept(settings, [sweep])
    found, by = standings(config, tmp_path)
    printed = io.StringIO()
    show(config, tmp_path, Console(file=printed, width=100))
    return [one.name for one in found], by, printed.getvalue()


def test_by_the_last_evaluation_and_what_is_not_finite_last(tmp_path):
    names, by, printed = ranked(tmp_path)
    assert (names, by) == (["r-2", "r-4", "r-8"], "eval_loss")
    rows = [line for line in printed.splitlines() if line.startswith("│")]  # how long the path is decides on the rest
    assert "not finite" in rows[-1] and f"best by eval loss: {tmp_path}" in printed.replace("\n", "")


def test_by_the_metric_that_the_run_looks_for_at_the_step_that_it_leaves(tmp_path):
    wanted = dict(eval_every=1, best_metric="right")
    assert ranked(tmp_path, **wanted)[:2] == (["r-4", "r-2", "r-8"], "eval_right")
    (tmp_path / "best.json").write_text(json.dumps({"metric": "eval_right", "step": 2, "value": 0.35}))
    assert ranked(tmp_path, **wanted)[0] == ["r-2", "r-4", "r-8"]
    assert ranked(tmp_path, **wanted, load_best=False)[0] == ["r-4", "r-2", "r-8"]


def test_without_an_evaluation_by_the_loss_in_training(tmp_path):
    log = [{key: value for key, value in record.items() if not key.startswith("eval")} for record in LOG]
    names, by, printed = ranked(tmp_path, log)
    assert (names, by) == (["r-2", "r-4", "r-8"], "loss")
    assert "best by loss of training" in printed and "eval loss" not in printed


def test_adapters_of_other_data_are_not_ranked(tmp_path):
    log = [{"step": 1, "loss/path-a": 2.0, "loss/path-b": 1.0}]
    names, _, printed = ranked(tmp_path, log, "data.path=a,b")
    assert names == ["path-a", "path-b"] and "best" not in printed


def test_the_loss_in_training_is_the_mean_over_the_last_tenth(tmp_path):
    log = [{"step": step, "loss/r-2": float(step), "loss/r-4": 0.0} for step in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    config = swept({"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 40}}, ["lora.r=2,4"])
    found, _ = standings(config, tmp_path)
    assert found[1].loss == pytest.approx((37 + 38 + 39 + 40) / 4)
