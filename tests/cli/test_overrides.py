"""Overrides are parsed by the type of the setting, not by what they look like."""

import pytest

from jlora.cli.overrides import read_config
from jlora.train.config import resolve


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("--config.model.path=123", "model.path", "123"),
        ("--config.data.path=True", "data.path", "True"),
        ("--config.optim.learning_rate=1e-3", "optim.learning_rate", 1e-3),
        ("--config.train.epochs=2", "train.epochs", 2.0),
        ("--config.train.remat=false", "train.remat", False),
        ("--noconfig.train.remat", "train.remat", False),
        ("--config.model.quant=nf4", "model.quant", "nf4"),
        ("--config.lora.target_modules=.*_proj", "lora.target_modules", ".*_proj"),
        ("--config.lora.target_modules=['q_proj','v_proj']", "lora.target_modules", ("q_proj", "v_proj")),
        ("--config.lora.rank_pattern={'layers.1.self_attn.q_proj':4}", "lora.rank_pattern",
         (("layers.1.self_attn.q_proj", 4),)),
        ("--config.mesh.fsdp=-1", "mesh.fsdp", -1),
    ],
)  # fmt: skip
def test_values(recipe, override, path, value):
    group, key = path.split(".")
    found = getattr(getattr(resolve(read_config(recipe, [override])), group), key)
    assert (found, type(found)) == (value, type(value))


def test_the_value_may_follow_as_an_argument_of_its_own_and_the_last_one_counts(recipe):
    config = resolve(read_config(recipe, ["--config.lora.r", "3", "--config.lora.r=5"]))
    assert config.lora.r == 5


def test_a_word_behind_the_file_goes_to_get_config(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from jlora.train.config import default_config\n\n\n"
        "def get_config(word='small'):\n    config = default_config()\n"
        "    config.model.path = word\n    return config\n"
    )
    assert read_config(str(path), []).model.path == "small"
    assert read_config(f"{path}:large", []).model.path == "large"


def test_two_commands_in_one_process_do_not_meet(recipe):
    first = resolve(read_config(recipe, ["--config.lora.r=7"]))
    assert (first.lora.r, resolve(read_config(recipe, [])).lora.r) == (7, 2)
