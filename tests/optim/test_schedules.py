"""Learning rates by step, against transformers'."""

import jax
import numpy as np
import pytest
import torch
import transformers

from jlora.optim import OptimConfig, learning_rate, learning_rates


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_are_transformers(name, warmup):
    kind = "constant_with_warmup" if name == "constant" else name
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = transformers.get_scheduler(kind, reference, num_warmup_steps=warmup, num_training_steps=12)
    ours = learning_rate(OptimConfig(learning_rate=0.1, schedule=name, warmup_steps=warmup), 12)
    for step in range(12):
        assert float(ours(step)) == pytest.approx(reference.param_groups[0]["lr"], abs=1e-7)
        reference.step()
        scheduler.step()


def test_the_rates_of_all_steps_are_one_program(caplog):
    config = OptimConfig(learning_rate=0.1, schedule="cosine", warmup_steps=3)
    jax.clear_caches()
    with jax.log_compiles():
        found = learning_rates(config, 12)
    assert sum("Compiling" in record.message for record in caplog.records) == 1
    np.testing.assert_allclose(found, [learning_rate(config, 12)(step) for step in range(12)], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "theirs", "settings", "specific"),
    [
        ("cosine", "cosine_with_min_lr", dict(warmup_steps=3, min_lr_ratio=0.2), dict(min_lr_rate=0.2)),
        ("wsd", "warmup_stable_decay", dict(warmup_ratio=0.2, decay_ratio=0.3), dict(num_decay_steps=4)),
        ("wsd", "warmup_stable_decay", dict(warmup_steps=3), dict(num_decay_steps=2)),
    ],
)
def test_least_rates_and_wsd_are_transformers(name, theirs, settings, specific):
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    counts = dict(num_warmup_steps=3, num_training_steps=12)
    scheduler = transformers.get_scheduler(theirs, reference, **counts, scheduler_specific_kwargs=specific)
    found = learning_rates(OptimConfig(learning_rate=0.1, schedule=name, **settings), 12)
    for rate in found:
        assert rate == pytest.approx(reference.param_groups[0]["lr"], abs=1e-7)
        reference.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_decays_end_at_the_least_rate(name):
    config = OptimConfig(learning_rate=0.1, schedule=name, min_lr_ratio=0.3, warmup_ratio=0.25)
    rates = learning_rates(config, 12)
    assert rates[3] == rates.max() == pytest.approx(0.1)
    assert float(learning_rate(config, 12)(12)) == pytest.approx(0.03)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("settings", [dict(warmup_ratio=1.0), dict(warmup_steps=9), dict(decay_ratio=1.0)])
def test_shares_that_do_not_fit_leave_finite_rates(steps, settings):
    rates = learning_rates(OptimConfig(schedule="wsd", learning_rate=0.1, **settings), steps)
    assert np.all((rates >= 0) & (rates <= 0.1 + 1e-6))
