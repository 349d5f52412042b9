import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import hub, quant, tree
from jlora.cli.main import main


@pytest.mark.parametrize(
    ("options", "format", "nested"),
    [([], "nf4", True), (["--quant=fp4", "--no-double-quant"], "fp4", False), (["--quant=int8"], "int8", False)],
)
def test_the_folder_holds_packed_linears(model_folder, tmp_path, options, format, nested, capsys):
    assert main(["quantize", f"--model={model_folder}", f"--out={tmp_path / 'out'}", "--dtype=bfloat16", *options]) == 0
    assert f"{format} model: {tmp_path / 'out'}" in capsys.readouterr().out
    _, params = hub.load(tmp_path / "out", dtype="bfloat16")
    packed = {path: leaf for path, leaf in tree.flatten(params).items() if quant.is_packed(leaf)}
    assert len(packed) == 7
    for leaf in packed.values():
        found = leaf.format if format != "int8" else "int8"
        assert (found, getattr(leaf, "nested_absmax", None) is not None) == (format, nested)
    assert hub.load_tokenizer(tmp_path / "out").chat_template == hub.load_tokenizer(model_folder).chat_template


def test_the_dtype_is_the_checkpoints(model_folder, tmp_path):
    assert main(["quantize", f"--model={model_folder}", f"--out={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert norm.dtype == np.float32


@pytest.mark.parametrize("by", ["data", "weights"])
def test_mixed_precision_keeps_some_kernels(model_folder, data_file, tmp_path, by, capsys):
    options = ["--bits=6", "--dtype=bfloat16", *([f"--data={data_file}"] if by == "data" else [])]
    assert main(["quantize", f"--model={model_folder}", f"--out={tmp_path / 'out'}", *options]) == 0
    assert "of 14 kernels stay in 16 bits: 6 bits a weight" in capsys.readouterr().out
    _, params = hub.load(tmp_path / "out", dtype="bfloat16")
    leaves = {path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("/kernel")}
    weights = sum(leaf.size for leaf in leaves.values())
    dense = sum(leaf.size for leaf in leaves.values() if not quant.is_packed(leaf))
    assert 0 < (16 * dense + 4.127 * (weights - dense)) / weights <= 6
    assert dense > 0.1 * weights
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert len(skipped) > 1 and "lm_head" in skipped


def test_records_that_are_wrong_are_refused_or_left_out(model_folder, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "AB", "completion": "CD"}) + "\n{}\n")
    options = ["quantize", f"--model={model_folder}", f"--out={tmp_path / 'out'}", "--bits=6", f"--data={path}"]
    assert main(options) == 2
    assert "1 of 2 records cannot be used" in capsys.readouterr().err
    assert main([*options, "--on_error=skip"]) == 0
    assert "are left out" in capsys.readouterr().err


def test_a_packed_folder_can_be_trained_on(recipe, model_folder, tmp_path, capsys):
    assert main(["quantize", f"--model={model_folder}", f"--out={tmp_path / 'out'}", "--bits=8"]) == 0
    workdir = tmp_path / "run"
    options = [f"--config.model.path={tmp_path / 'out'}", "--config.train.steps=2"]
    assert main(["train", f"--config={recipe}", f"--workdir={workdir}", *options]) == 0
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    merged = tmp_path / "merged"
    assert main(["export", f"--workdir={workdir}", f"--out={merged}", "--merged"]) == 0
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quant=int4"], "bitsandbytes has no format 'int4'; expected one of nf4, fp4, int8"),
        (["--bits=3"], "bits=3.0: found no such mixture, expected from 4.2"),
        (["--data=x.jsonl"], "--data measures where 16 bits matter most, so it needs --bits"),
        (["--bits=5", "--data=x.jsonl"], "x.jsonl"),
        (["--dtype=int8"], "expected one of bfloat16, float16, float32"),
    ],
)
def test_mistakes(model_folder, tmp_path, options, message, capsys):
    assert main(["quantize", f"--model={model_folder}", f"--out={tmp_path / 'out'}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_model_is_not_written_over(model_folder, capsys):
    assert main(["quantize", f"--model={model_folder}", f"--out={model_folder}"]) == 2
    assert "is also --model; choose another place" in capsys.readouterr().err
