"""A random Llama of a few thousand weights with a byte tokenizer, as a Hugging Face folder, and a few records."""

import json

import pytest

from jlora.cli.main import main

RECORDS = [
    {"messages": [{"role": "user", "content": f"{i}+{i}="}, {"role": "assistant", "content": str(2 * i)}]}
    for i in range(12)
]


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(path)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, model_folder, data_file):
    """A recipe that trains the tiny model for three steps."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(
        "from jlora.train.config import default_config\n\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.model.path = {model_folder!r}\n"
        f"    config.data.path = {data_file!r}\n"
        "    config.train.steps = 3\n"
        "    config.train.batch_size = 2\n"
        "    config.train.seq_len = 32\n"
        "    config.lora.r, config.lora.lora_alpha = 2, 6\n"
        "    return config\n"
    )
    return str(path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, recipe):
    """The workdir of the recipe's run, from the first step to the last."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", f"--config={recipe}", f"--workdir={workdir}", "--config.train.save_every=2"]) == 0
    return workdir
