"""The loop that the README writes with jlora's functions learns what `run` learns."""

import json
import pathlib
import re

import numpy as np
from safetensors.numpy import load_file

from jlora.train import resolve, run
from jlora.train.reporting.metrics import read_metrics

README = pathlib.Path(__file__).parents[2] / "jlora" / "train" / "README.md"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_readmes_loop_is_the_loop(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = pathlib.Path(NAME)
    link.parent.mkdir()
    link.symlink_to(model_folder)
    records = [{"prompt": f"{n} + 1 = ", "completion": str(n + 1) * (1 + n % 3)} for n in range(25)]
    pathlib.Path("train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    [code] = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "optax.adam(" in code]
    printed = []
    exec(code, {"print": printed.append})
    settings = {
        "model": {"path": NAME, "dtype": "bfloat16", "quant": "nf4"},
        "data": {"path": "train.jsonl"},
        "lora": {"r": 16, "target_modules": "all-linear"},
        "optim": {"learning_rate": 2e-4, "schedule": "constant"},
        "train": {"epochs": 3, "batch_size": 2, "seq_len": 128},
    }
    run(resolve(settings), tmp_path / "run")
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert len(losses) > 3 and printed == [f"loss {loss:.3f}" for loss in losses]
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", tmp_path / "run/adapter")
    )
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5, err_msg=name)
