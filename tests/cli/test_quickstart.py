"""scripts/quickstart.py from end to end, with the tiny model and four questions in place of the downloads."""

import importlib.util
import json
import pathlib
import sys

import peft
import pytest
import transformers

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def question(number):
    call = {"name": "add", "arguments": {"a": number}}
    return {
        "id": f"q{number}",
        "messages": [
            {"role": "user", "content": f"Add [{number}]."},
            {"role": "assistant", "content": json.dumps(call)},
        ],
        "functions": [{"name": "add", "parameters": {"properties": {"a": {}}, "required": ["a"]}}],
        "ground_truth": {"add": {"a": [number]}},
    }


@pytest.fixture
def quickstart(monkeypatch, model_folder):
    """The script as a module whose downloads are the tiny model."""
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPTS / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def prepare(out, cache):
        out.mkdir(parents=True)
        for name, numbers in (("train", range(8)), ("test", range(8, 12))):
            (out / f"{name}.jsonl").write_text("".join(json.dumps(question(n)) + "\n" for n in numbers))
        return pathlib.Path(model_folder)

    monkeypatch.setattr(module.function_calling, "prepare", prepare)
    yield module
    sys.modules.pop("function_calling", None)


def test_it_measures_trains_measures_and_shows_where_everything_is(quickstart, model_folder, tmp_path, capsys):
    workdir = tmp_path / "run"
    short = ["--config.train.epochs=1", "--config.train.seq_len=192", "--config.lora.r=2"]
    quickstart.main([f"--workdir={workdir}", "--questions=3", "--max_new_tokens=4", *short])
    text = capsys.readouterr().out
    assert "3 test questions" in text
    assert all(line in text for line in quickstart.MEASURES.values())
    assert "Add [8]." in text
    assert str(workdir / "curves.png") in text
    assert (workdir / "curves.png").is_file()
    assert f"peft.PeftModel.from_pretrained(base, {str(workdir / 'adapter')!r})" in text

    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = peft.PeftModel.from_pretrained(base, str(workdir / "adapter"))
    assert adapted.peft_config["default"].r == 2
