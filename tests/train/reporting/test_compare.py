"""Runs beside each other: what differs, what came of them, and folders that are no runs."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest
from safetensors.numpy import save_file

from jlora.errors import UserError
from jlora.train import resolve
from jlora.train.config import to_dict
from jlora.train.reporting.compare import compare, draw


@pytest.fixture
def make(tmp_path):
    """make(name, losses, …): the workdir of a run, as a run leaves it."""

    def made(name, losses, *, records=(), done=True, rate=1e-3, usage=None, best=None, **groups):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 4}}
        config = resolve(settings | {"optim": {"learning_rate": rate}} | groups)
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        rows = [{"step": step, "loss": loss, "num_tokens": 10 * step} for step, loss in enumerate(losses, 1)]
        rows = [row | dict(more) for row, more in zip(rows, [*records, *[{}] * len(rows)], strict=False)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for file, value in (("usage.json", usage), ("best.json", best)):
            if value:
                (folder / file).write_text(json.dumps(value))
        for adapter in config.adapters if done else ():
            (folder / "adapters" / adapter).mkdir(parents=True)
        if done and not config.adapters:
            (folder / "adapter").mkdir()
        return folder

    return made


def test_the_table_has_what_differs_and_what_came_of_it(make):
    usage = {"tokens_per_second": 100.0, "peak_bytes": 2**30, "trainable_parameters": 12, "device": "cpu"}
    best = {"metric": "eval_loss", "step": 2, "value": 0.5}
    evaluated = [{}, {"eval_loss": 0.5, "eval_f1": 0.1, "eval_tokens": 9}, {}, {"eval_loss": 0.7, "eval_f1": 0.2}]
    one = make("a/run", [4.0, 3.0, 2.0, 1.0], records=evaluated, usage=usage, best=best, lora={"r": 8})
    other = make("b/run", [4.0, None], done=False, rate=2e-3, lora={"r": 4})
    found = compare([one, other, f"{one}/"])
    assert found.differing == ["lora.r", "optim.learning_rate"]
    first, second = found.rows()
    assert first == {
        "name": "a/run",
        "workdir": str(one),
        "finished": True,
        "settings": {"lora.r": 8, "optim.learning_rate": 1e-3},
        "steps": 4,
        "loss": 1.0,
        "eval_loss": 0.7,
        "eval_f1": 0.2,
        "best": best,
        "tokens": 40,
        **{name: usage[name] for name in ("tokens_per_second", "peak_bytes", "trainable_parameters")},
    }
    assert (second["finished"], second["steps"], second["loss"]) == (False, 2, 4.0) and "eval_loss" not in second
    assert list(found.remarks) == ["b/run has not finished: it is at step 2 of 4"]


def test_the_loss_is_that_of_the_last_twentieth(make):
    (row,) = compare([make("run", [9.0] * 98 + [2.0] * 2 + [1.0, 3.0, 2.0])]).rows()
    assert row["loss"] == 2.0


def test_adapters_of_one_run_are_runs(make):
    records = [{"loss/shop": 1.0, "loss/law": 3.0, "eval_loss/shop": 0.1, "eval_loss/law": 0.3, "eval_loss": 0.2}]
    adapters = {"shop": {"lora": {"r": 2}}, "law": {"optim": {"learning_rate": 0.5}}}
    folder = make("run", [2.0], records=records, adapters=adapters, usage={"trainable_parameters": 99})
    save_file(
        {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)},
        folder / "adapters" / "shop" / "adapter_model.safetensors",
    )
    found = compare([folder])
    assert {row["name"]: (row["loss"], row["eval_loss"]) for row in found.rows()} == {
        "run/law": (3.0, 0.3),
        "run/shop": (1.0, 0.1),
    }
    assert found.differing == ["lora.r", "optim.learning_rate"]
    assert [row.get("trainable_parameters") for row in found.rows()] == [None, 10]


def test_runs_of_different_kinds_say_so(make):
    pairs = make("dpo", [0.7], algorithm="dpo", data={"path": "d", "eval_path": "x"}, records=[{"eval_loss": 0.6}])
    texts = make("sft", [2.0], data={"path": "d", "eval_path": "y"}, records=[{"eval_perplexity": 6.0}])
    found = compare([pairs, texts])
    assert list(found.remarks) == [
        "their losses are not the same quantity: dpo, sft",
        "they were evaluated on different data: x, y",
    ]
    assert "eval_perplexity" not in found.rows()[0] and "eval_loss" not in found.rows()[1]


def test_every_folder_that_is_no_run_is_named(make, tmp_path):
    (tmp_path / "empty").mkdir()
    unbegun, damaged = make("unbegun", []), make("damaged", [1.0])
    (damaged / "usage.json").write_text("{")
    with pytest.raises(UserError) as error:
        compare([tmp_path / "empty", tmp_path / "nowhere", unbegun, damaged, make("good", [1.0])])
    for part in ("empty is not the workdir of a run", "nowhere is not the", "unbegun has logged no step", "not JSON"):
        assert part in str(error.value)


def test_the_plot_has_a_curve_for_each_run(make, tmp_path):
    evaluated = [{"eval_loss": 1.0}, {"eval_loss": 0.5}]
    runs = [compare([make(f"run{n}", np.linspace(3, 1, 60).tolist(), records=evaluated)]).runs[0] for n in range(12)]
    draw(tmp_path / "two.png", runs[:2])
    first = matplotlib.image.imread(tmp_path / "two.png")
    apart = [[row | {"loss": row["loss"] + number} for row in run.records] for number, run in enumerate(runs)]
    moved = [dataclasses.replace(run, records=records) for run, records in zip(runs, apart, strict=True)]
    draw(tmp_path / "apart.png", moved)
    assert coloured(matplotlib.image.imread(tmp_path / "apart.png")) > 3 * coloured(first)


def coloured(image):
    return int((np.ptp(image[..., :3], axis=-1) > 0.3).sum())
