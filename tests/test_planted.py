"""The table of planted faults still fits the package: every line is there, once, and every test that must notice."""

import ast
import importlib.util
import pathlib
import shlex

import pytest

FILE = pathlib.Path(__file__).parent / "planted.py"
SPEC = importlib.util.spec_from_file_location("planted", FILE)
planted = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(planted)


@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.name)
def test_the_line_is_there_once_and_the_fault_is_code(fault):
    text = (planted.ROOT / "jlora" / fault.file).read_text(encoding="utf-8")
    changed = planted.planted(text, fault)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert (planted.ROOT / "tests" / shlex.split(fault.tests)[0]).is_file()


def test_there_are_at_least_fifty_in_files_of_every_kind():
    assert len({fault.name for fault in planted.FAULTS}) == len(planted.FAULTS) >= 50
    folders = {fault.file.partition("/")[0] for fault in planted.FAULTS}
    assert folders >= {"train", "generate", "losses", "lora", "quant", "models", "sharding", "data", "hub", "optim"}


def test_a_line_that_is_gone_or_there_twice_is_named():
    fault = planted.FAULTS[0]
    with pytest.raises(ValueError, match="0 times"):
        planted.planted("", fault)
    with pytest.raises(ValueError, match="2 times"):
        planted.planted(2 * f"{fault.before}\n", fault)
