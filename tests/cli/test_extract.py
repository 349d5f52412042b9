"""`jlora extract`: PEFT puts what it wrote on the base and gets the tuned model."""

import json
import pathlib
import shutil

import peft
import torch
import transformers

from jlora.cli.main import main


def test_peft_opens_what_was_extracted(model_folder, tmp_path, capsys):
    tuned = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, weight in tuned.named_parameters():
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            left, right = (
                torch.randn(*size, generator=generator) for size in ((weight.shape[0], 2), (2, weight.shape[1]))
            )
            weight.data += 0.02 * left @ right
    tuned.save_pretrained(tmp_path / "tuned")
    for file in pathlib.Path(model_folder).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "tuned")
    options = [f"--base={model_folder}", f"--model={tmp_path / 'tuned'}", f"--out={tmp_path / 'adapter'}"]
    assert main(["extract", *options, "--rank=2"]) == 0
    assert "100.0000% of the energy kept" in capsys.readouterr().out
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = base(torch.arange(9)[None]).logits
    found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(torch.arange(9)[None]).logits
    expected = tuned(torch.arange(9)[None]).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (before - expected).abs().max() > 0.01


def test_a_base_is_given_the_rows_of_a_model_that_has_more(model_folder, tmp_path, capsys):
    tuned = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    rows = tuned.config.vocab_size + 3
    tuned.resize_token_embeddings(rows)
    tuned.save_pretrained(tmp_path / "tuned")
    options = ["extract", f"--base={model_folder}", f"--model={tmp_path / 'tuned'}", f"--out={tmp_path / 'adapter'}"]
    options += ["--target_modules", "q_proj", "--modules_to_save", "embed_tokens"]
    options += [] if tuned.config.tie_word_embeddings else ["lm_head"]
    assert main(options) == 2
    assert f"vocab_size: {rows - 3} and {rows}" in capsys.readouterr().err
    assert main([*options, f"--vocab={rows}"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    base.resize_token_embeddings(rows)
    ids = torch.arange(rows - 9, rows)[None]
    found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(found, tuned(ids).logits, atol=2e-5, rtol=1e-5)


def test_what_changes_no_computation_may_differ(model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "chat")
    path = tmp_path / "chat" / "config.json"
    harmless = {"transformers_version": "4.1", "use_cache": False, "eos_token_id": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | harmless | {"max_position_embeddings": 77}))
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7], "top_p": 0.9}))
    options = [f"--base={model_folder}", f"--model={tmp_path / 'chat'}", f"--out={tmp_path / 'adapter'}"]
    assert main(["extract", *options, "--target_modules", "q_proj"]) == 0
    assert "100.0000% of the energy kept" in capsys.readouterr().out


def test_settings_that_differ_are_refused(model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    options = [f"--base={model_folder}", f"--model={tmp_path / 'other'}", f"--out={tmp_path / 'adapter'}"]
    assert main(["extract", *options]) == 2
    assert "norm_eps: 1e-06 and 0.5" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
    assert main(["extract", *options[:2], f"--out={model_folder}"]) == 2
    assert "is also --base; choose another place" in capsys.readouterr().err
