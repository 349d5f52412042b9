"""What a card tells of a run."""

import json
import pathlib

from jlora.train import resolve
from jlora.train.config import to_dict
from jlora.train.reporting import story
from jlora.train.reporting.compare import read_runs


def test_numbers_settings_and_data(tmp_path):
    """First and last numbers, the best step, what is not a default; a path of this machine only by its last part."""
    settings = {"model": {"path": "m", "adapter": str(tmp_path / "begun")}, "data": {"path": "owner/set/sub:test"}}
    settings |= {"data": settings["data"] | {"eval_path": str(tmp_path / "held_out.jsonl")}}
    settings |= {"train": {"steps": 40, "best_metric": "loss", "eval_every": 1}, "optim": {"b1": 0.8}, "lora": {"r": 3}}
    (tmp_path / "config.json").write_text(json.dumps(to_dict(resolve(settings))))
    rows = [
        {"step": step, "loss": 4.0 / step, "eval_loss": 5.0 / step, "num_tokens": 1000 * step} for step in (1, 2, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "best.json").write_text(json.dumps({"metric": "eval_loss", "step": 4, "value": 1.25}))
    (tmp_path / "usage.json").write_text(json.dumps({"tokens_per_second": 12.0, "peak_bytes": 2**30, "mfu": 0.25}))
    (run,) = read_runs(tmp_path, "mine")
    text = "\n".join(story.sections(run, curves=False))
    for told in (
        "| loss | 4 | 1 |",
        "| eval_loss | 5 | 1.25 |",
        "Best `eval_loss`: 1.25, at step 4. The weights are those of this step.",
        "| `lora.r` | `3` |",
        "| `optim.b1` | `0.8` |",
        "| `model.adapter` | `begun` |",
        "| steps | 4 of 40 (unfinished) |",
        "| tokens | 4,000 |",
        "| peak memory | 1.00 GiB |",
        "| MFU | 25.0% |",
        "| training | owner/set/sub:test | not recorded |",
        "| evaluation | held_out.jsonl | not recorded |",
    ):
        assert told in text, told
    assert not any(untold in text for untold in ("optim.b2", "curves.png", str(tmp_path), "best_metric.path"))
    assert story.datasets(run) == ["owner/set"] and pathlib.Path(tmp_path).name not in text
