"""What kills a run at whatever moment changes nothing of its end; a disk that fills up leaves the last checkpoint."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from jlora import checkpoint
from jlora.errors import UserError
from jlora.train import resolve, run
from jlora.train.reporting.metrics import read_metrics
from jlora.train.restore import load_run

ROOT = pathlib.Path(__file__).parents[2]
REWARD = "def reward(completions, **_):\n    return [float(len(text) % 3) for text in completions]\n"


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture(scope="module")
def settings(model_folder, tmp_path_factory):
    """settings(algorithm, steps): a small run that saves at every step."""
    folder = tmp_path_factory.mktemp("data")
    records = [
        {"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}.", "chosen": f"{2 * i}.", "rejected": f"{i}."}
        for i in range(1, 25)
    ]
    for name, keys in (("sft", ("prompt", "completion")), ("dpo", ("prompt", "chosen", "rejected"))):
        rows = [{key: record[key] for key in keys} for record in records]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "grpo.jsonl").write_text((folder / "sft.jsonl").read_text())
    (folder / "reward.py").write_text(REWARD)
    rollout = {"rewards": [str(folder / "reward.py")], "num_generations": 2, "max_completion_length": 6}

    def make(algorithm, steps):
        own = {"rollout": rollout} if algorithm == "grpo" else {}
        return own | {
            "algorithm": algorithm,
            "model": {"path": model_folder},
            "data": {"path": str(folder / f"{algorithm}.jsonl")},
            "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
            "optim": {"learning_rate": 1e-3},
            "train": {"steps": steps, "batch_size": 2, "seq_len": 32, "save_every": 1},
        }

    return make


def start(settings, workdir, limit=None):
    """A process that runs `jlora train`; `limit`: of bytes in a file it writes, once its first checkpoint is there."""
    recipe = workdir.with_suffix(".json")
    recipe.write_text(json.dumps(settings))
    watch = (
        "import pathlib, resource, threading, time\n"
        "def fill():\n"
        f"    while not pathlib.Path({str(workdir)!r}, 'checkpoints', '1').is_dir():\n"
        "        time.sleep(0.01)\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "threading.Thread(target=fill, daemon=True).start()\n"
    )
    command = ["train", f"--config={recipe}", f"--workdir={workdir}"]
    code = f"import sys\nfrom jlora.cli.main import main\nsys.exit(main({command!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", (watch if limit else "") + code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(process, workdir, moment, step=0):
    """Kills the process so many seconds after it has done a step, this one or a later; whether it was still at work."""
    log, begun = workdir / "metrics.jsonl", time.time_ns()

    def done():
        if not (log.exists() and log.stat().st_mtime_ns > begun):
            return False
        return any(json.loads(line)["step"] >= step for line in log.read_text().splitlines() if line.endswith("}"))

    while process.poll() is None and not done():
        time.sleep(0.005)
    time.sleep(moment)
    working = process.poll() is None
    process.send_signal(signal.SIGKILL) if working else None
    process.communicate()
    return working


def end(workdir):
    """The adapter's bytes, and what the log says besides speeds."""
    adapter = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter, [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(workdir)
    ]


def test_a_run_that_is_killed_once_ends_as_the_whole_one(settings, tmp_path):
    """The one test of the default suite that starts a process to kill it."""
    chosen = settings("sft", 12)
    workdir = tmp_path / "killed"
    assert kill(start(chosen, workdir), workdir, 0.05, step=3)
    assert not (workdir / "adapter").exists()
    run(resolve(chosen), workdir)
    run(resolve(chosen), tmp_path / "whole")
    assert end(workdir) == end(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "kills"), [("sft", 4), ("dpo", 3), ("grpo", 3)])
def test_a_run_that_is_killed_at_random_moments_ends_as_the_whole_one(settings, tmp_path, algorithm, kills):
    """Ten kills in all, each within three steps that the run before did not reach, in and between its checkpoints."""
    chosen = settings(algorithm, 3 * kills + 2)
    moments = random.Random(algorithm)
    workdir = tmp_path / "killed"
    for number in range(kills):
        step = 3 * number + moments.randint(1, 3)
        assert kill(start(chosen, workdir), workdir, moments.uniform(0.0, 0.1), step), f"kill {number + 1}"
        assert not (workdir / "adapter").exists()
    whole, last = (start(chosen, folder) for folder in (tmp_path / "whole", workdir))
    said = [process.communicate()[1] for process in (whole, last)]
    assert [process.returncode for process in (whole, last)] == [0, 0], said
    assert end(workdir) == end(tmp_path / "whole")


def test_a_reward_that_fails_loses_no_step_that_was_trained(settings, tmp_path):
    """Of a run that saves seldom; mended, it goes on from there."""
    reward = tmp_path / "reward.py"
    faulty = (
        "def reward(completions, trainer_state, **_):\n    return [{}[trainer_state.global_step]] * len(completions)\n"
    )
    reward.write_text(faulty.replace("{}", "{0: 0.5, 1: 0.25}"))
    chosen = settings("grpo", 3)
    chosen |= {"rollout": chosen["rollout"] | {"rewards": [str(reward)]}, "train": chosen["train"] | {"save_every": 50}}
    with pytest.raises(UserError, match=f"{reward}, line 2: KeyError: 2"):
        run(resolve(chosen), tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0] == 2
    reward.write_text(REWARD)
    with pytest.raises(UserError, match=r"contents of rollout\.rewards: .*reward\.py has changed"):
        run(resolve(chosen), tmp_path / "run")
    run(resolve(chosen | {"train": chosen["train"] | {"on_changed_files": "note"}}), tmp_path / "run")
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_disk_that_fills_up_is_named_and_leaves_the_last_checkpoint(settings, tmp_path):
    """The size of files is limited instead, which the operating system refuses at the same place."""
    workdir = tmp_path / "run"
    process = start(settings("sft", 30), workdir, limit=2000)
    _, said = process.communicate()
    assert process.returncode == 1, said
    assert "Traceback" not in said, said  # neither jlora's nor one of TensorStore's threads
    last = said.splitlines()[-1]
    assert last.startswith("jlora: ") and str(workdir) in last and "File too large" in last, said
    config, _, _ = load_run(workdir)
    assert config.train.steps == 30
