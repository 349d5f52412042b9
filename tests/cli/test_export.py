import filecmp
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers

import jlora
from jlora import hub, tree
from jlora.cli.main import main


@pytest.mark.parametrize("step", [(), ("--step=3",)])
def test_the_last_step_is_the_adapter_of_the_run(trained, tmp_path, step):
    assert main(["export", f"--workdir={trained}", f"--out={tmp_path / 'out'}", *step]) == 0
    names = sorted(path.name for path in (trained / "adapter").iterdir())
    assert filecmp.cmpfiles(trained / "adapter", tmp_path / "out", names, shallow=False) == (names, [], [])


def test_a_folded_adapter_has_one_scale(trained, tmp_path):
    """On request, or because the run says so."""
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((trained / "config.json").read_text())
    assert config["train"]["fold"] is False
    config["train"]["fold"] = True
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for name, options in (("asked", [f"--workdir={trained}", "--fold"]), ("set", [f"--workdir={tmp_path / 'run'}"])):
        assert main(["export", *options, f"--out={tmp_path / name}"]) == 0
        found = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert found["lora_alpha"] == found["r"]
    plain = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert plain["lora_alpha"] != plain["r"]
    assert main(["export", f"--workdir={trained}", "--merged", "--fold", f"--out={tmp_path / 'no'}"]) == 2
    assert not (tmp_path / "no").exists()


def test_an_earlier_step_is_another_adapter(trained, tmp_path):
    assert main(["export", f"--workdir={trained}", f"--out={tmp_path / 'out'}", "--step=2"]) == 0
    assert not filecmp.cmp(*(path / "adapter_model.safetensors" for path in (trained / "adapter", tmp_path / "out")))


def test_a_merged_model_opens_in_transformers_without_the_adapter(trained, model_folder, tmp_path, capsys):
    assert main(["export", f"--workdir={trained}", f"--out={tmp_path / 'out'}", "--merged"]) == 0
    shown = capsys.readouterr().out
    assert "100.00% of the update kept" in shown and "KL(unmerged ‖ merged): " in shown
    assert main(["export", f"--workdir={trained}", f"--out={tmp_path / 'out'}", "--merged", "--unmeasured"]) == 0
    assert capsys.readouterr().out == f"merged model: {tmp_path / 'out'}\n"
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    changed = {name for name in base if not merged[name].equal(base[name])}
    assert changed == {name for name in base if "_proj" in name}
    assert hub.load_tokenizer(tmp_path / "out").chat_template == hub.load_tokenizer(model_folder).chat_template


def test_a_model_that_cannot_be_measured_is_written_all_the_same(trained, tmp_path, monkeypatch, capsys):
    def fails(*inputs):
        raise ValueError("no room for it")

    monkeypatch.setattr("jlora.cli.export.print_kept", fails)
    with pytest.warns(UserWarning, match=r"could not be measured \(--unmeasured\): no room for it"):
        assert main(["export", f"--workdir={trained}", f"--out={tmp_path / 'out'}", "--merged"]) == 0
    assert capsys.readouterr().out == f"merged model: {tmp_path / 'out'}\n"
    assert jlora.load(tmp_path / "out")


def test_a_step_that_was_not_saved_is_a_mistake(trained, tmp_path, capsys):
    assert main(["export", f"--workdir={trained}", f"--out={tmp_path / 'out'}", "--step=1"]) == 2
    message = capsys.readouterr().err
    assert "1" in message
    assert "2, 3" in message


def test_what_the_run_needs_is_not_written_over(trained, model_folder, capsys):
    for out, name in ((trained, "--workdir"), (model_folder, "the run's base")):
        assert main(["export", f"--workdir={trained}", f"--out={out}", "--merged"]) == 2
        assert f"is also {name}; choose another place" in capsys.readouterr().err


def test_another_base_than_the_one_trained_on_is_refused(trained, model_folder, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["path"] = str(tmp_path / "other")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert main(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "its weights differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_to_gguf(trained, model_folder, tmp_path):
    """The model in one file, and the adapter in another, are what the folders hold."""
    for name, options in {
        "model.gguf": ("--merged", "--gguf=f32"),
        "adapter.gguf": ("--gguf=f32",),
        "folder": ("--merged",),
    }.items():
        modelfile = ["--modelfile"] if name.endswith("gguf") else []
        assert main(["export", f"--workdir={trained}", f"--out={tmp_path / name}", *options, *modelfile]) == 0
        if modelfile:
            (tmp_path / "Modelfile").rename(tmp_path / f"{name}.modelfile")
    lines = {name: (tmp_path / f"{name}.gguf.modelfile").read_text().splitlines() for name in ("model", "adapter")}
    assert lines["model"][1] == "FROM ./model.gguf"
    assert {f"FROM {model_folder}", "ADAPTER ./adapter.gguf"} <= set(lines["adapter"])
    (_, found), (_, expected) = hub.load(tmp_path / "model.gguf"), hub.load(tmp_path / "folder")
    expected = tree.flatten(expected)
    for path, leaf in tree.flatten(found).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"} <= names
