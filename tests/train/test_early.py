"""What is wrong around a run is found before its model is loaded, and nothing is left behind."""

import json
import os
import sys

import pytest

from jlora import hub
from jlora.errors import UserError
from jlora.train import early, resolve, run


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture
def settings(model_folder, tmp_path, monkeypatch):
    """Of each algorithm's kind; whatever loads a model fails."""

    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(hub, "load", load)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b"}
    (tmp_path / "data.jsonl").write_text(json.dumps(pair) + "\n")
    (tmp_path / "rewards.py").write_text(
        "def reward(completions, **_):\n    return [0.0] * len(completions)\n\n\n"
        "def wants(completions, solution):\n    return [0.0] * len(completions)\n\n\n"
        "def metric(record):\n    return {'x': 1.0}\n"
    )
    data = {"path": str(tmp_path / "data.jsonl")}
    train = {"steps": 1, "batch_size": 2, "seq_len": 32}
    sft = {"algorithm": "sft", "model": {"path": model_folder}, "data": data, "train": train}
    rewards = {"rewards": [f"{tmp_path}/rewards.py"], "num_generations": 2, "max_completion_length": 4}
    return {
        "sft": sft,
        "dpo": sft | {"algorithm": "dpo"},
        "grpo": sft | {"algorithm": "grpo", "rollout": rewards},
        "ppo": sft | {"algorithm": "ppo", "rollout": rewards},
    }


def changed(settings, group, **values):
    return settings | {group: settings.get(group, {}) | values}


def refused(settings, tmp_path, match):
    with pytest.raises(UserError, match=match):
        run(resolve(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "ppo"])
def test_evaluation_data_that_is_not_there(settings, tmp_path, algorithm):
    refused(changed(settings[algorithm], "data", eval_path=str(tmp_path / "nowhere.jsonl")), tmp_path, "nowhere")


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "ppo"])
def test_what_is_right_comes_to_the_model(settings, tmp_path, algorithm):
    with pytest.raises(AssertionError, match="the model is loaded"):
        run(resolve(settings[algorithm]), tmp_path / "run")


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nowhere.py", "nowhere.py is not a file"),
        ("rewards.py:rewrad", r"defines no function rewrad\(\); it defines metric, reward, wants"),
        ("rewards.py:wants", r"wants the columns \['solution'\], the records have"),
        (
            "metric:rewards.py:x",
            r"defines metric\(record\): too many positional arguments; expected metric\(record, te",
        ),
    ],
)
def test_rewards(settings, tmp_path, algorithm, name, match):
    name = name.replace("rewards.py", f"{tmp_path}/rewards.py")
    refused(changed(settings[algorithm], "rollout", rewards=[name]), tmp_path, match)


def test_adapters_are_all_named(settings, tmp_path):
    missing = changed(settings["grpo"], "model", adapter=str(tmp_path / "none"))
    missing = changed(missing, "rollout", reward_model=str(tmp_path / "nor"), rewards=["model"])
    refused(missing, tmp_path, r"model\.adapter: .*none[\s\S]*rollout\.reward_model: .*nor")


def test_a_form_of_attention_that_the_device_does_not_run(settings, tmp_path):
    refused(changed(settings["sft"], "model", attention="splash"), tmp_path, r"model\.attention: .*runs on a tpu")
    with pytest.raises(UserError, match=r"model\.attention: found 'flash', expected one of auto, plain, blocked"):
        resolve(changed(settings["sft"], "model", attention="flash"))


def test_missing_packages(settings, tmp_path, monkeypatch):
    for name in ("tensorboardX", "wandb", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    wanted = changed(settings["sft"], "train", tensorboard=True, trackers=["wandb", "trackio", "mlflow"])
    refused(wanted, tmp_path, r"(?s)jlora\[wandb\].*jlora\[trackio\].*jlora\[mlflow\].*jlora\[tensorboard\]")


def test_a_workdir_that_cannot_be_written(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; expected a folder to work in"):
        run(resolve(settings["sft"]), tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, which may write anywhere
    with pytest.raises(UserError, match="is not writable"):
        early.check_writable(tmp_path / "new" / "run")
