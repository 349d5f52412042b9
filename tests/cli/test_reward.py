"""A reward model from the command line: trained, evaluated with its plot, and refused where it does not belong."""

import json

import pytest

from jlora.cli.main import main
from jlora.train.metrics import read_metrics

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "no" + "o" * i} for i in range(6)]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return str(path)


@pytest.fixture(scope="module")
def reward_run(recipe, pairs_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reward")
    paths = {"data.path": pairs_file, "data.eval_path": pairs_file}
    settings = paths | {"algorithm": "reward", "train.eval_every": 3, "optim.learning_rate": 0.01}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    assert main(["train", f"--config={recipe}", f"--workdir={workdir}", *overrides]) == 0
    return workdir


def test_evaluation_is_that_of_the_run_with_a_plot(model_folder, reward_run, pairs_file, tmp_path, capsys):
    plot = tmp_path / "calibration.png"
    arguments = [f"--model={model_folder}", f"--adapter={reward_run / 'adapter'}", f"--data={pairs_file}"]
    capsys.readouterr()
    assert main(["eval", "--pairs", "--json", f"--plot={plot}", "--seq_len=32", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = read_metrics(reward_run)[-1]
    for name in ("accuracy", "margin", "mean_reward"):
        assert found[name] == pytest.approx(expected[f"eval_{name}"], rel=1e-4, abs=1e-5)
    assert found["n"] == 6
    assert plot.read_bytes()[:4] == (reward_run / "calibration.png").read_bytes()[:4] == b"\x89PNG"


def test_what_does_not_go_together_is_said(model_folder, reward_run, pairs_file, data_file, capsys):
    model, adapter = f"--model={model_folder}", f"--adapter={reward_run / 'adapter'}"
    for arguments, message in (
        ([model, adapter, f"--data={data_file}"], "is a reward model; --pairs"),
        ([model, f"--data={pairs_file}", "--pairs"], "it has no score head"),
        ([model, f"--data={pairs_file}", "--pairs", "--loss_only"], "--loss_only has no effect with --pairs"),
        ([model, f"--data={data_file}", "--plot=x.png"], "--plot has no effect without --pairs"),
    ):
        assert main(["eval", *arguments]) == 2
        assert message in capsys.readouterr().err
