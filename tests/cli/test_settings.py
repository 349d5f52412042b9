"""What is read of the settings in the source is what their classes say."""

import dataclasses
import re
import typing

import pytest

from jlora.cli import settings
from jlora.train.config import RunConfig
from jlora.train.config.typed import describe, group_of, is_required


def fields(cls, path=""):
    """(name, annotation, default) of every setting, as Python has them; a default of None if it is required."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if group := group_of(field, hints[field.name]):
            yield from fields(group, f"{path}{field.name}.")
            continue
        made = field.default_factory is not dataclasses.MISSING
        default = None if is_required(field) else repr(field.default_factory() if made else field.default)
        yield path + field.name, hints[field.name], default


FIELDS = {name: (hint, default) for name, hint, default in fields(RunConfig)}
READ = {setting.name: setting for setting in settings.settings()}


def test_every_setting_is_there_and_no_other():
    assert READ.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_has_its_type_its_default_and_a_sentence(name):
    hint, default = FIELDS[name]
    modules = r"\b(?:[a-z_]+\.)+(?=[A-Z])"
    assert READ[name].type == re.sub(modules, "", describe(hint))
    assert READ[name].default == default
    assert len(READ[name].sentence) > 8


def test_choices_are_all_that_a_type_allows():
    assert READ["algorithm"].choices[:2] == ("sft", "dft")
    assert READ["train.remat"].choices == ("true", "false", "full", "offload", "none")
    assert READ["train.greater_is_better"].choices == ("true", "false", "None")
    assert READ["train.experts"].choices == ("stacked", "each")
    assert READ["train.steps"].choices == READ["data.path"].choices == ()


def test_groups_are_told_with_what_leaves_them_out():
    groups = {group.name: group for group in settings.groups()}
    assert [name for name, group in groups.items() if group.optional] == ["lora"]
    assert all(group.sentence.endswith(".") for name, group in groups.items() if name)
    assert "--config.lora=None: without." in settings.described("lora.r")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit(width):
    lines = settings.described(width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert "  --config.lora.r  int; default 8" in lines
