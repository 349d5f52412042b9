"""A merge-aware run: the folder that it is exported to is packed, and computes what the run ended with."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers

from jlora import hub, lora, tree
from jlora.cli.main import main
from jlora.errors import UserError
from jlora.quant import Rounded
from jlora.train import resolve, run
from jlora.train.adapt import adapt
from jlora.train.restore import load_run


@pytest.mark.slow
def test_a_run_ends_in_a_folder_that_bitsandbytes_opens_with_the_trained_outputs(model_folder, tmp_path):
    data = tmp_path / "train.jsonl"
    records = [{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(40)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "model": {"path": model_folder, "dtype": "float32", "quant": {"merge_aware": True}},
        "data": {"path": str(data)},
        "lora": {"r": 4, "target_modules": "all-linear"},
        "optim": {"learning_rate": 1e-2, "schedule": "constant"},
        "train": {"steps": 8, "batch_size": 4, "seq_len": 32},
    }
    with pytest.raises(ValueError, match="lora_dropout: the packed sum of base and adapter"):
        resolve(settings | {"lora": {"lora_dropout": 0.1}})
    last = run(resolve(settings), tmp_path / "run")
    assert last["loss"] < 4
    assert main(["export", f"--workdir={tmp_path / 'run'}", "--merged", f"--out={tmp_path / 'packed'}"]) == 0
    _, model, params = load_run(tmp_path / "run")
    tokens = np.random.default_rng(0).integers(1, 60, (2, 9)).astype(np.int32)
    expected = np.asarray(model(params, tokens))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert opened.config.quantization_config.quant_method == "bitsandbytes"
    found = opened(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    adapter = ["--quant=nf4", "--lossy", f"--adapter={tmp_path / 'run' / 'adapter'}", f"--out={tmp_path / 'merged'}"]
    assert main(["merge", f"--model={model_folder}", "--dtype=float32", *adapter]) == 0
    model, again = hub.load(tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(model(again, tokens), expected, atol=1e-4)


SIZES = dict(vocab_size=37, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2, head_dim=8)
NO_EXPERTS = [[".*/experts/.*", None], [".*layers/.*/kernel", "nf4"]]
ONLY_EXPERTS = [[".*/experts/.*/kernel", "mxfp4"]]


@pytest.mark.parametrize(
    ("kind", "rules", "warns"),
    [
        ("Mixtral", None, True),
        ("Mixtral", NO_EXPERTS, False),
        ("Mixtral", ONLY_EXPERTS, True),
        ("GptOss", ONLY_EXPERTS, False),
        ("GptOss", [*ONLY_EXPERTS, *NO_EXPERTS[1:]], True),
    ],
)
def test_packed_experts_are_warned_of_before_the_run(kind, rules, warns, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "base")
    quant = {"merge_aware": True} | ({"rules": rules} if rules else {})
    settings = {"data": {"path": "x.jsonl"}, "train": {"steps": 1, "seq_len": 8}}
    config = resolve(settings | {"model": {"path": str(tmp_path / "base"), "quant": quant}})
    model, params = hub.load(tmp_path / "base", quant=config.model.quant)
    with pytest.warns(UserWarning, match="no folder for transformers can hold") if warns else nullcontext():
        adapted = adapt(model, params, config)
    assert any(isinstance(leaf, Rounded) for leaf in tree.flatten(adapted).values())
    if kind == "GptOss":  # it is as was said
        with pytest.raises(UserError, match="nothing else") if warns else nullcontext():
            hub.save_quantized(tmp_path / "out", model, lora.merge(adapted))
