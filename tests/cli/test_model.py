"""Every command that loads a model says what its weights are kept in, apart from its results."""

import argparse

import pytest

from jlora.cli.model import load_model, open_model
from jlora.cli.parsers.options import MESH


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_what_weights_are_kept_in_is_said_once_and_not_beside_json(quant, json, model_folder, capsys):
    options = dict(model=model_folder, dtype="float32", quant=quant, vocab=None, adapter=None, fold_system=False)
    options |= dict.fromkeys(MESH, 1)
    load_model(argparse.Namespace(**options, json=json))
    shown = capsys.readouterr()
    assert shown.out == ""
    said = [line for line in shown.err.splitlines() if "iB)" in line]
    if not quant or json:  # of a dense model that is not packed there is nothing to say
        assert said == []
        return
    assert len(said) == 1
    assert said[0].startswith(f"{model_folder}: weights ") and "% in nf4 (" in said[0] and "% in float32 (" in said[0]


def test_commands_without_such_options_say_it_too(model_folder, capsys):
    open_model(model_folder, quant="int8")
    assert "in int8 (" in capsys.readouterr().err
