"""Every recipe in configs/ resolves once its placeholders are filled, and says what they are while they are not."""

import pathlib
import runpy

import pytest

from jlora.cli import recipes
from jlora.cli.overrides import read_config
from jlora.train.config import ModelSource, RunConfig, TrainConfig, default_config, resolve

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.py"))
PLACEHOLDERS = {
    "sft.py": {"model.path", "data.path", "train.epochs"},
    "quickstart.py": {"model.path", "data.path"},
    "smollm2_135m.py": {"data.path"},
    "llama3_8b_qlora.py": {"data.path"},
    "llama3_8b_tpu.py": {"data.path"},
    "qwen3_4b_24gb.py": {"data.path"},
    "qwen3_8b_80gb.py": {"data.path"},
    "gemma3_4b_v5e8.py": {"data.path"},
    "dpo.py": {"model.path", "data.path", "train.epochs"},
    "reward.py": {"model.path", "data.path", "train.epochs"},
    "grpo.py": {"model.path", "data.path", "train.epochs"},
    "ppo.py": {"model.path", "data.path", "train.epochs"},
    "function_calling_dpo.py": {"model.path", "data.path"},
    "function_calling_reward.py": {"model.path", "data.path"},
    "function_calling_ppo.py": {"model.path", "data.path"},
    "reasoning_grpo.py": {"model.path"},
}
VALUES = {"model.path": "some/model", "data.path": "train.jsonl", "train.epochs": "3"}
# Rollouts have no end of their own, and want to be judged.
JUDGED = ["--config.train.steps=3", "--config.rollout.rewards=('rewards.py',)"]
HELD_OUT = ["--config.data.eval_path=held_out.jsonl"]
MORE = {
    "grpo.py": JUDGED,
    "ppo.py": JUDGED,
    "function_calling_dpo.py": HELD_OUT,
    "function_calling_reward.py": HELD_OUT,
    "function_calling_ppo.py": [*HELD_OUT, "--config.rollout.reward_model=reward/adapter"],
}


def test_the_table_holds_every_recipe():
    assert sorted(PLACEHOLDERS) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_with_its_placeholders_filled(name):
    overrides = [f"--config.{key}={VALUES[key]}" for key in sorted(PLACEHOLDERS[name])]
    overrides += MORE.get(name, [])
    config = resolve(read_config(str(CONFIGS / name), overrides))
    assert isinstance(config, RunConfig)
    assert config.data.path == ("reasoning_gym:chain_sum" if name == "reasoning_grpo.py" else "train.jsonl")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_each_placeholder_that_is_not_filled(name):
    with pytest.raises(ValueError) as error:
        resolve(read_config(str(CONFIGS / name), []))
    message = str(error.value)
    assert "unknown" not in message
    assert {key for key in VALUES if key in message} == PLACEHOLDERS[name]


@pytest.mark.parametrize("variant", sorted(runpy.run_path(str(CONFIGS / "grpo.py"))["VARIANTS"]))
def test_every_relative_of_grpo_resolves(variant):
    overrides = ["--config.model.path=m", "--config.data.path=d", *JUDGED]
    plain, config = (resolve(read_config(f"{CONFIGS / 'grpo.py'}{word}", overrides)) for word in ("", f":{variant}"))
    assert variant == "dapo" or config.grpo != plain.grpo


# What may be given, and with what it is given.
GIVEN = VALUES | {
    "train.steps": "3",
    "rollout.rewards": "('rewards.py',)",
    "rollout.reward_model": "reward/adapter",
    "data.eval_path": "held_out.jsonl",
}


def required(name):
    """The settings that a recipe says it requires: of those with "or" between them one."""
    said = recipes.recipes()[name.removesuffix(".py")].needs.partition(";")[0]
    return [group.split(" or ") for group in said.split(", ")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_requires_what_it_says_and_nothing_else(name):
    def faults(settings):
        try:
            resolve(read_config(str(CONFIGS / name), [f"--config.{key}={GIVEN[key]}" for key in settings]))
        except ValueError as error:
            return str(error)

    needed = required(name)
    for place, choices in enumerate(needed):
        others = [group[0] for group in needed[:place] + needed[place + 1 :]]
        for choice in choices:
            assert faults([*others, choice]) is None
        assert any(choice in faults(others) for choice in choices)


def test_the_general_recipe_is_the_defaults():
    config = resolve(
        read_config(
            str(CONFIGS / "sft.py"), ["--config.model.path=m", "--config.train.steps=1", "--config.data.path=d"]
        )
    )
    assert config.model == ModelSource("m")
    assert config.train == TrainConfig(steps=1)


def test_a_config_from_python_is_the_same_as_from_the_command_line():
    config = default_config()
    config.model.path, config.data.path, config.train.steps = "m", "d", 7
    overrides = ["--config.model.path=m", "--config.data.path=d", "--config.train.steps=7"]
    assert resolve(config) == resolve(read_config(str(CONFIGS / "sft.py"), overrides))
