"""Settings of the optimizer: defaults by name, and everything that is refused."""

import dataclasses
import math

import pytest

from jlora.optim import OptimConfig
from jlora.train.config import completed, default_config, resolve, to_dict


def test_faults_are_all_listed():
    with pytest.raises(ValueError) as error:
        OptimConfig(schedule="exponential", learning_rate=0.0, b1=1.0, warmup_steps=-1)
    with pytest.raises(ValueError, match=r"(?s)learning_rate=inf: expected .*weight_decay=inf: expected zero"):
        OptimConfig(learning_rate=math.inf, weight_decay=math.inf, max_grad_norm=math.inf)
    for part in ("schedule='exponential'", "learning_rate=0.0", "b1=1.0", "warmup_steps=-1"):
        assert part in str(error.value)


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"name='adamw8bit'.*adamw, adamw_8bit, adafactor, lion, muon.*mean adamw_8bit"
    ):
        OptimConfig(name="adamw8bit")


def test_settings_that_an_optimizer_or_schedule_lacks_are_refused_by_name():
    with pytest.raises(ValueError) as error:
        OptimConfig(name="lion", eps=1e-8, momentum=0.9, min_lr_ratio=0.1, schedule="constant", decay_ratio=0.1)
    for part in ("eps=1e-08: lion has no such setting; it has b1, b2", "momentum=0.9: lion", "min_lr_ratio=0.1"):
        assert part in str(error.value)
    assert "decay_ratio=0.1: only schedule='wsd'" in str(error.value)
    with pytest.raises(ValueError, match="schedule='cosine': schedule_free_adamw averages"):
        OptimConfig(name="schedule_free_adamw", schedule="cosine")
    with pytest.raises(ValueError, match="warmup_steps=2 says the same"):
        OptimConfig(warmup_ratio=0.1, warmup_steps=2)


def test_defaults_are_those_of_the_named_optimizer():
    assert OptimConfig(name="lion").b2 == 0.99 and OptimConfig(name="lion").eps is None
    assert OptimConfig(name="schedule_free_adamw").schedule == "constant"
    config = OptimConfig(name="muon", b1=0.8)
    assert (config.b1, config.momentum) == (0.8, 0.95) and dataclasses.replace(config) == config


def test_a_run_keeps_and_compares_every_setting():
    """What config.json says opens again as the same run, and that of a version without names is AdamW's."""
    config = default_config()
    config.model.path, config.data.path, config.train.steps = "model", "data.jsonl", 1
    run = resolve(config)
    written = to_dict(run)
    assert resolve(written) == run and written["optim"]["b1"] == 0.9
    older = {name: value for name, value in written["optim"].items() if name in OLDER}
    assert completed(written | {"optim": older})["optim"] == written["optim"]
    config.optim.name = "muon"
    assert to_dict(resolve(config))["optim"] != written["optim"]


OLDER = ("learning_rate", "schedule", "warmup_steps", "weight_decay", "b1", "b2", "eps", "max_grad_norm")
OLDER += ("loraplus_lr_ratio",)
