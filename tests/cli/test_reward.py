"""A reward model from the command line: trained, evaluated with its plot, and refused where it does not belong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jlora
from jlora import data
from jlora.cli.main import main
from jlora.train import resolve
from jlora.train.algorithms import reward_model
from jlora.train.algorithms.algorithm import Base
from jlora.train.reporting.metrics import read_metrics

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


@pytest.mark.slow  # train/algorithms/test_alignment.py has it without the command line
def test_ppo_is_rewarded_by_the_reward_model(recipe, reward_run, data_file, tmp_path):
    settings = {
        "algorithm": "ppo",
        "data.path": data_file,
        "train.steps": 1,
        "train.seq_len": 64,
        "rollout.rewards": "('model',)",
        "rollout.reward_model": reward_run / "adapter",
        "rollout.num_generations": 1,
        "rollout.max_completion_length": 4,
        "ppo.num_ppo_epochs": 1,
    }
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    assert main(["train", f"--config={recipe}", f"--workdir={tmp_path}", *overrides]) == 0
    [numbers] = read_metrics(tmp_path)
    assert numbers["objective/scores"] == pytest.approx(numbers["rewards/model/mean"])
    assert np.isfinite(numbers["loss"]) and (tmp_path / "value" / "adapter_config.json").exists()


def test_a_rollout_is_scored_at_its_end_and_an_ended_message_behind_its_tail(model_folder, reward_run):
    model, params = jlora.load(model_folder)
    mesh = jlora.make_mesh(jlora.MeshConfig())
    base = Base(model, jlora.load_tokenizer(model_folder), mesh, params, {}, {}, None)
    given = {"rewards": ("model",), "reward_model": str(reward_run / "adapter"), "num_generations": 1}
    config = {"algorithm": "ppo", "model": {"path": model_folder}, "data": {"path": "p"}, "rollout": given}
    config |= {"train": {"steps": 1, "batch_size": 2, "seq_len": 300}}
    scorer = reward_model.RewardModel(base, resolve(config))
    scorer._tail = np.array([7, 9], np.int32)
    rows = [[1, 2, 3, 4], [1, 2, 3], [5, 6], [8, 8, 8]]
    items = [data.Item((data.Example(np.array(row, np.int32), np.array(row) > 2),), {}) for row in rows]
    found = scorer(items, [True, False, False, True], [0, 0, 1, 2])
    adapted = jlora.load_adapter(params, reward_run / "adapter")
    for score, row, tail in zip(found, rows, ([7, 9], [], [], [7, 9]), strict=True):
        hidden, _ = model.hidden(adapted, jnp.array([row + tail], jnp.int32))
        assert score == pytest.approx(float(model.score(adapted, hidden)[0, -1]), rel=1e-4, abs=1e-5)


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


def test_an_adapter_on_a_reward_model_of_transformers_merges(byte_tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
    config = transformers.LlamaConfig(**sizes, num_labels=1, pad_token_id=0, tie_word_embeddings=False)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    byte_tokenizer.save_pretrained(tmp_path / "base")
    model, params = jlora.load(tmp_path / "base")
    adapter = jlora.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    params = jlora.lora.init(params, adapter, jax.random.key(0))
    jlora.save_adapter(tmp_path / "adapter", params, base=str(tmp_path / "base"))
    options = [f"--model={tmp_path / 'base'}", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"]
    assert main(["merge", *options]) == 0
    assert "KL(unmerged" in capsys.readouterr().out
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    hidden, _ = model.hidden(params, jnp.arange(1, 9)[None])
    found = merged(torch.arange(1, 9)[None]).logits[0, 0].item()
    assert found == pytest.approx(float(model.score(params, hidden)[0, -1]), rel=1e-5)
