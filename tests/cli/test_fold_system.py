"""A system text for a template that refuses one: training, answers and exports fold it alike."""

import argparse
import json
import shutil

import pytest

from jlora import hub
from jlora.cli.main import main
from jlora.cli.model import load_model
from jlora.cli.parsers.options import add_model_options
from jlora.data import encode_prompt
from jlora.errors import UserError

CHAT = [{"role": "system", "content": "Sum."}, {"role": "user", "content": "2+2="}]


@pytest.fixture
def folder(model_folder, tmp_path):
    """The tiny model with a template as Gemma has it."""
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = hub.load_tokenizer(model_folder)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_system_text_is_folded_in_training_and_in_what_is_exported(folder, recipe, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": [*CHAT, {"role": "assistant", "content": "4"}]}) + "\n")
    run = tmp_path / "run"
    train = [
        "train",
        f"--config={recipe}",
        f"--workdir={run}",
        f"--config.model.path={folder}",
        f"--config.data.path={data}",
        "--config.train.steps=1",
        "--config.train.seq_len=64",
    ]
    assert main(train) == 2
    assert 'System role not supported; data.system="fold" (--fold_system) puts' in capsys.readouterr().err
    assert main([*train, "--config.data.system=fold"]) == 0
    assert main(["export", f"--workdir={run}", f"--out={tmp_path / 'out'}", "--merged", "--unmeasured"]) == 0
    tokenizer = hub.load_tokenizer(tmp_path / "out")
    folded = [{"role": "user", "content": "Sum.\n\n2+2="}]
    assert encode_prompt(CHAT, tokenizer) == encode_prompt(folded, tokenizer)
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    for flags, folds in (([], False), (["--fold_system"], True)):
        _, _, tokenizer = load_model(parser.parse_args([f"--model={folder}", *flags]))
        if folds:
            assert encode_prompt(CHAT, tokenizer) == encode_prompt(folded, tokenizer)
        else:
            with pytest.raises(UserError, match="--fold_system"):
                encode_prompt(CHAT, tokenizer)
