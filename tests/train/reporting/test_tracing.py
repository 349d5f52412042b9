"""A trace holds the steps that were asked for, and a run that ends early leaves what there is of it."""

import json

import jax
import pytest

from jlora.cli.main import main
from jlora.train.reporting import tracing


def steps_of(folder):
    """The numbers of the steps that the trace in a folder marks."""
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")  # where xprof and TensorBoard look
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = (event for plane in planes for line in plane.lines for event in line.events)
    return sorted({dict(event.stats).get("step_num") for event in events if event.name.startswith("train")} - {None})


def test_a_run_traces_the_steps_after_those_that_compile(model_folder, tmp_path, capsys):
    records = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "model": {"path": model_folder},
        "data": {"path": str(tmp_path / "train.jsonl")},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "train": {"steps": 6, "batch_size": 2, "seq_len": 24},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(settings))
    folder = tmp_path / "run" / "profile"
    command = ["train", f"--config={tmp_path}/recipe.json", f"--workdir={tmp_path}/run"]
    assert main([*command, "--profile=2"]) == 0
    assert f"a trace of steps 3 to 4 is in {folder}" in capsys.readouterr().err
    assert steps_of(folder)[:2] == [3, 4]
    assert main([*command, "--profile=-1"]) == 2
    assert "train.profile: found -1, expected at least 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "start", "total", "traced"),
    [
        (3, 0, 100, [3, 4, 5]),
        (3, 40, 100, [43, 44, 45]),
        (3, 0, 4, [2, 3, 4]),
        (9, 0, 4, [1, 2, 3, 4]),
        (1, 3, 4, [4]),
        (2, 4, 4, []),
        (0, 0, 9, []),
    ],
)
def test_which_steps_are_traced(tmp_path, monkeypatch, count, start, total, traced):
    found, open_ = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", open_.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", open_.pop)
    with tracing.Trace(tmp_path, count, start, total, print) as trace:
        for number in range(start + 1, total + 1):
            with trace.step(number):
                found += [number] if open_ else []
            trace.done(number)
    assert found == traced and not open_


def test_a_trace_is_written_when_the_run_fails(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with pytest.raises(KeyError), tracing.Trace(tmp_path, 5, 0, 5, print) as trace, trace.step(1):
        raise KeyError
    assert calls == ["start", "stop"]
