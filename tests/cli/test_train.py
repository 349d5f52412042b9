"""A run leaves what the design promises; a stopped one says so with its exit code and goes on where it was."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jlora.cli.main import main
from jlora.cli.train import _Stop
from jlora.train.reporting.metrics import read_metrics
from jlora.train.reporting.progress import Progress


def test_a_run_leaves_config_metrics_curves_and_adapter(trained):
    config = json.loads((trained / "config.json").read_text())
    assert (config["lora"]["r"], config["train"]["save_every"]) == (2, 2)
    assert [record["step"] for record in read_metrics(trained)] == [1, 2, 3]
    assert {"loss", "learning_rate", "grad_norm"} <= set(read_metrics(trained)[0])
    assert (trained / "curves.png").stat().st_size > 1000
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"2", "3"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (trained / "adapter").iterdir()
    }


def test_a_finished_run_started_again_changes_nothing(trained, recipe):
    before = (trained / "adapter" / "adapter_model.safetensors").read_bytes(), read_metrics(trained)
    assert main(["train", f"--config={recipe}", f"--workdir={trained}", "--config.train.save_every=2"]) == 0
    assert ((trained / "adapter" / "adapter_model.safetensors").read_bytes(), read_metrics(trained)) == before


def test_sigterm_saves_and_exits_75_and_the_same_command_goes_on(trained, recipe, tmp_path, monkeypatch, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    update = Progress.update

    def preempted(progress, step, metrics):
        update(progress, step, metrics)
        os.kill(os.getpid(), signal.SIGTERM)

    command = ["train", f"--config={recipe}", f"--workdir={tmp_path}", "--config.train.save_every=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", preempted)
        assert main(command) == 75
    assert "SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers

    assert main(command) == 0
    losses = [record["loss"] for record in read_metrics(trained)]
    assert [record["loss"] for record in read_metrics(tmp_path)] == losses
    weights = [path / "adapter" / "adapter_model.safetensors" for path in (trained, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_a_run_at_once(recipe, tmp_path, monkeypatch, capsys, number):
    """Wherever it comes: here within code that survives all errors."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def interrupted(*_):
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), number)
        raise AssertionError("the run goes on")

    monkeypatch.setattr(Progress, "start", interrupted)
    assert main(["train", f"--config={recipe}", f"--workdir={tmp_path}"]) == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped early: {number.name} before a step was done; the same command starts again"
    assert not (tmp_path / "adapter").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_hosts_that_wait_for_each_other_stop_after_the_same_step(capsys):
    stop = _Stop(Progress(sys.stderr), alone=False)
    stop.handle(signal.SIGTERM, None)
    assert stop() and not stop.at_once
    assert "SIGTERM: stopping once a step is done" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_the_workdir_is_named_after_the_recipe_unless_given(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"--config={recipe}", "--config.train.steps=1"]) == 0
    assert (tmp_path / "runs" / "tiny" / "adapter").is_dir()


def test_the_script_is_the_command():
    script = pathlib.Path(__file__).parents[2] / "scripts" / "train.py"
    root = script.parents[1]
    done = subprocess.run(
        [sys.executable, str(script), "--config=nowhere.py"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "jlora: nowhere.py is not a file; expected a Python file that defines get_config()\n"
