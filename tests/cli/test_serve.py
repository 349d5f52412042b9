"""`jlora serve` as a process: its address, its key, adapters, and its end."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time

import jax
import openai
import pytest

import jlora
from jlora.cli.main import main
from jlora.cli.parsers import parse
from jlora.errors import UserError


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    _, params = jlora.load(model_folder, dtype="float32")
    config = jlora.LoraConfig(r=2, init_lora_weights=False, lora_alpha=200)
    jlora.save_adapter(folder / "law", jlora.lora.init(params, config, jax.random.key(0)))
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    return folder


def test_answers_on_their_way_are_finished_after_sigterm(model_folder, adapters):
    options = [f"--model={model_folder}", f"--adapters={adapters}", "--name=tiny", "--port=0", "--length=256"]
    environment = os.environ | {"JLORA_API_KEY": "secret"}
    command = [sys.executable, "-m", "jlora", "serve", *options, "--rows=2", "--chunk=32"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        line = process.stdout.readline()
        found = re.fullmatch(r"tiny and 1 adapter: (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert found, line + process.stderr.read()
        client = openai.OpenAI(base_url=found[1], api_key="secret", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        assert [model.id for model in client.models.list()] == ["tiny", "law"]
        settings = dict(max_tokens=200, temperature=0, extra_body={"ignore_eos": True}, stream=True)
        streams = [client.completions.create(model=name, prompt="a", **settings) for name in ("law", "tiny", "law")]
        first = [next(iter(stream)) for stream in streams[:2]]
        process.send_signal(signal.SIGTERM)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            rest = list(pool.map(list, streams))
        assert [chunks[-1].choices[0].finish_reason for chunks in rest] == ["length"] * 3
        assert len(first) == 2 and process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        assert "adapter broken: not added: " in process.stderr.read()


@pytest.mark.parametrize(("options", "signals"), [(["--drain=1"], 1), ([], 2)])
def test_answers_that_are_not_complete_in_time_end_with_an_error(model_folder, options, signals):
    command = [sys.executable, "-m", "jlora", "serve", f"--model={model_folder}", "--port=0", "--length=128", *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*command, "--rows=1"], **pipes) as process:
        address = process.stdout.readline().split()[-1]
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        settings = dict(max_tokens=120, prompt="a", extra_body={"ignore_eos": True}, stream=True)
        streams = [client.completions.create(model=name, **settings) for _ in range(40)]
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        with pytest.raises(openai.APIError, match="the engine is stopping"):
            list(streams[-1])
        assert process.wait(60) == 0 and process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--adapters=nowhere"], "--adapters: no folder nowhere"),
        (["--rank=4", "--places=2"], "--places, --rank: expected --adapters with it"),
        (["--adapters_dtype=bfloat16"], "--adapters_dtype: expected --adapters with it"),
        (["--api_key="], "--api_key: found an empty text"),
        (["--host=256.0.0.1"], "cannot listen on 256.0.0.1:0"),
        (["--port=70000"], "found 70000, expected 0 to 65535"),
        (["--queue=-1"], "queue=-1: expected 0 or more"),
        (["--length=1000000"], "length 1000000: the model was made for texts of up to"),
    ],
)
def test_mistakes_are_said_before_anything_is_served(model_folder, capsys, options, told):
    assert main(["serve", f"--model={model_folder}", "--port=0", *options]) == 2
    assert told in capsys.readouterr().err


def test_the_adapters_are_held_in_the_dtype_that_is_asked_for(model_folder, adapters, monkeypatch):
    held = []

    def engine(model, params, *_, **__):
        held.append(params)
        raise UserError("enough")

    monkeypatch.setattr("jlora.cli.serve.Engine", engine)
    common = ["serve", f"--model={model_folder}", f"--adapters={adapters}", "--port=0", "--places=2"]
    for options in ([], ["--adapters_dtype=bfloat16"]):
        assert main([*common, *options]) == 2
    factors = [bank.params["layers"]["self_attn"]["q_proj"]["lora_a"] for bank in held]
    assert [str(factor.dtype) for factor in factors] == ["float32", "bfloat16"]


def test_this_machine_alone_is_the_default():
    assert parse("serve", ["--model=x"]).host == "127.0.0.1"
