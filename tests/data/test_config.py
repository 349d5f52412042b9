"""Data settings that do not hold are refused together."""

import pytest

from jlora.data import DataConfig


def test_every_bad_setting_is_named_at_once():
    with pytest.raises(ValueError) as error:
        DataConfig(path="", eval_path="", overlong="wrap", bucket=0)
    for words in (
        "data.path",
        "data.eval_path",
        "found 'wrap', expected one of cut, drop, error",
        "data.bucket: found 0",
    ):
        assert words in str(error.value)


def test_the_defaults_hold():
    config = DataConfig(path="train.jsonl")
    assert (config.packing, config.overlong, config.completion_only) == (True, "drop", True)
