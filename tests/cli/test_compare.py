"""`jlora compare` on runs of the command line."""

import json

import pytest

from jlora.cli.main import main
from jlora.train import resolve
from jlora.train.config import to_dict


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, rate in (("one", 1e-3), ("two", 2e-3)):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 2}}
        config = resolve(settings | {"optim": {"learning_rate": rate}})
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        rows = ({"step": step, "loss": rate * 1000 / step, "num_tokens": 1000 * step} for step in (1, 2))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one" / "adapter").mkdir()
    best = {"metric": "eval_loss", "step": 2, "value": 0.25}
    (tmp_path / "one" / "best.json").write_text(json.dumps(best))
    (tmp_path / "one" / "usage.json").write_text(json.dumps({"peak_bytes": 2**31, "tokens_per_second": 1234.5}))
    return tmp_path


def test_a_table_and_a_plot(runs, capsys):
    assert main(["compare", "one", "two"]) == 0
    said = capsys.readouterr().out
    for part in ("optim.learning_rate", "0.001", "2,000", "2.00 GiB", "1,234", "loss 0.25 at 2", "two *"):
        assert part in said, part
    assert "two has not finished: it is at step 2 of 2" in said and "plot: compare.png" in said
    assert (runs / "compare.png").stat().st_size > 5000


def test_json_alone_writes_nothing(runs, capsys):
    assert main(["compare", "one", "two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["settings"] for run in found["runs"]] == [{"optim.learning_rate": rate} for rate in (1e-3, 2e-3)]
    assert not list(runs.glob("*.png"))
    assert main(["compare", "one", "--json", "--out=mine.png"]) == 0 and (runs / "mine.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not the workdir of a run"),
        (["one", "--out=plot.pdf"], "--out=plot.pdf: expected a file FILE.png"),
        (["one", "--out=none/plot.png"], "found no folder none"),
    ],
)
def test_mistakes_are_messages(runs, capsys, arguments, message):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
