"""A loss that explodes ends the run, with a checkpoint from before it; no healthy run is ended."""

import json
import math

import numpy as np
import pytest

from jlora.train import Diverged, finite, loop, resolve, run
from jlora.train.diverging import WINDOW, Rise, sound
from jlora.train.reporting.metrics import read_metrics


def ends(losses, times=2.0):
    """The step at which a run with these losses is ended; None if it is not."""
    rise = Rise(times)
    for step, loss in enumerate(losses, 1):
        rise.see(float(loss), step)
        if rise.diverged:
            return step
    return None


def noisy(level, deviation, seed=0):
    return np.abs(np.random.default_rng(seed).normal(level, deviation, np.shape(level)))


FALLING = 2 * np.exp(-np.arange(60) / 20) + 0.5


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        (np.concatenate([FALLING, [9.0] * 30]), 70),
        (np.concatenate([FALLING, np.linspace(1, 20, 60)]), 82),
        ([0.7] * 10 + [3.0] * 30, 20),
        ([25.0] * 20 + [24.0] * 10 + [80.0] * 10, 40),  # IPO's losses are far from 1
    ],
)
def test_an_exploding_loss_ends_the_run_ten_steps_later(losses, step):
    assert ends(losses) == step
    assert ends(losses, None) is None


@pytest.mark.parametrize(
    "losses",
    [
        noisy(FALLING, 0.8),
        [*FALLING, *[9.0] * 9, 0.6, *[9.0] * 9],  # spikes
        noisy(np.repeat([2.0, 0.05, 0.02], 100), 0.5),  # the epochs of few rows
        noisy(np.full(300, 25.0), 12.0),
        [11.0] * 10 + [7.0] * 40 + [3.0] * 40 + [11.0] * 40,  # no worse than it began
        [*FALLING, *[math.nan] * 20, 0.6],
    ],
)
def test_a_healthy_one_does_not(losses):
    assert ends(losses) is None


def test_a_rise_is_the_same_across_a_resume():
    losses = np.concatenate([FALLING, np.linspace(1, 20, 60)])
    for at in (5, 30, 62, 78):
        one, other = Rise(2.0), Rise(2.0)
        for step, loss in enumerate(losses[:at], 1):
            one.see(float(loss), step)
        other.set_state(json.loads(json.dumps(one.get_state())))
        for step, loss in enumerate(losses[at:82], at + 1):
            one.see(float(loss), step)
            other.see(float(loss), step)
        assert one.get_state() == other.get_state() and one.diverged


def test_the_checkpoint_from_before_the_rise():
    rise = Rise(2.0)
    for step in range(1, 31):
        rise.see(1.0 if step < 21 else 2.5, step)
    assert rise.since == 21 and not rise.diverged  # above half of what is too much
    assert sound([rise, Rise(2.0)], [5, 15, 20, 25]) == [15]
    assert sound([rise], [20, 25]) == [20]  # its weights gave the first high loss, but there is no better
    assert sound([rise], [25]) == [] == sound([Rise(2.0)], [5, 15])


def test_of_several_adapters_the_run_ends_with_the_last(tmp_path):
    said = []
    guard = finite.Guard("stop", ("a", "b"), tmp_path, said.append, 2.0)
    for step in range(1, 61):
        losses = np.array([9.0 if step > 20 else 1.0, 9.0 if step > 40 else 1.0])
        guard.see({"finite": np.array([True, True]), "loss": losses, "grad_norm": losses}, step)
        assert bool(guard.ended) == (step >= 50)
    assert [line.partition(": the losses")[0] for line in said] == [
        "a: its loss has exploded at step 30",
        "b: its loss has exploded at step 50",
    ]
    assert f"is that of step 10: {tmp_path}/checkpoints/10" in str(guard.error([10, 30, 60]))


@pytest.fixture(scope="module")
def model_folder(make_llama):
    return make_llama(hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=1)


def test_a_run_stops_and_keeps_the_last_good_checkpoint(model_folder, tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} is ", "completion": f"{i}."}) + "\n" for i in range(40)))
    settings = {
        "model": {"path": model_folder},
        "data": {"path": str(path)},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "train": {"steps": 60, "batch_size": 2, "seq_len": 24, "save_every": 4, "keep_checkpoints": 1},
    }
    device_get = loop.jax.device_get
    count = iter(range(1, 1000))

    def explode(metrics):
        found = device_get(metrics)
        return found | {"loss": np.float32(50.0)} if "loss" in found and next(count) > 21 else found

    monkeypatch.setattr(loop.jax, "device_get", explode)
    with pytest.raises(Diverged) as error:
        run(resolve(settings), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 21 + WINDOW
    message = str(error.value)
    assert "stopped: the loss has exploded at step 31: the losses of the last 10 steps all lie above" in message
    assert f"from before it rose is that of step 20; `jlora export --workdir={tmp_path}/run --step=20" in message
    assert "train.max_rise=None" in message
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [20, 28]
