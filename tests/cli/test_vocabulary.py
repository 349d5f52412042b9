"""Tokens that the model has no row for are refused wherever tokens are made, and a base is resized on request."""

import json
import re
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import jlora
from jlora import data, models
from jlora.cli.main import main
from jlora.data import Example
from jlora.generate import rollout
from jlora.train import resolve, run
from jlora.train.evaluation import forgetting, sensitivity
from jlora.train.evaluation.records import evaluate, example_sums
from jlora.train.restore import load_run

NEW = "<|new|>"
ROWS = 257


@pytest.fixture(scope="module")
def wide(model_folder, tmp_path_factory):
    """A model of 257 rows whose tokenizer has been given more tokens: 257 and, by chance, some others before."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = jlora.load_tokenizer(folder)
    more = int(np.random.default_rng(0).integers(0, 5))
    tokenizer.add_tokens([f"<|more{i}|>" for i in range(more)] + [NEW], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(wide):
    return *jlora.load(wide), jlora.load_tokenizer(wide)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TEXT = {"prompt": f"one {NEW}", "completion": "two"}
CHAT = {"messages": [{"role": "user", "content": f"one {NEW}"}, {"role": "assistant", "content": "two"}]}
PAIR = {"prompt": f"one {NEW}", "chosen": "two", "rejected": "three"}
GOOD = {"prompt": "one", "completion": "two"}
RUNS = {
    "sft on texts": ("sft", TEXT, {}),
    "sft on chats": ("sft", CHAT, {}),
    "sft, evaluation data": ("sft", GOOD, {"eval": TEXT}),
    "dpo": ("dpo", PAIR, {}),
    "kto": ("kto", {"prompt": f"one {NEW}", "completion": "two", "label": True}, {}),
    "reward": ("reward", PAIR, {}),
    "grpo": (
        "grpo",
        {"prompt": f"one {NEW}"},
        {"rollout": {"rewards": ("REWARD",), "max_completion_length": 4, "num_generations": 2}},
    ),
    "ppo": (
        "ppo",
        {"prompt": f"one {NEW}"},
        {"rollout": {"rewards": ("REWARD",), "max_completion_length": 4, "num_generations": 2}},
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_refuses_tokens_without_a_row_before_it_writes_anything(case, wide, tmp_path):
    algorithm, row, more = RUNS[case]
    settings = {
        "algorithm": algorithm,
        "model": {"path": wide},
        "data": {"path": write(tmp_path / "train.jsonl", [row] * 3)},
        "train": {"steps": 1, "batch_size": 2, "seq_len": 64},
    }
    if "eval" in more:
        settings["data"]["eval_path"] = write(tmp_path / "eval.jsonl", [more["eval"]])
        settings["train"]["eval_every"] = 1
    if "rollout" in more:
        (tmp_path / "reward.py").write_text("def reward(completions, **rest):\n    return [0.0] * len(completions)\n")
        settings["rollout"] = more["rollout"] | {"rewards": (f"{tmp_path}/reward.py:reward",)}
    with pytest.raises(jlora.UserError) as error:
        run(resolve(settings), tmp_path / "run")
    said(error, wide)
    assert not (tmp_path / "run").exists()


def said(error, wide):
    """The token, its id, the number of rows, and what to do."""
    number = jlora.load_tokenizer(wide).convert_tokens_to_ids(NEW)
    for part in (repr(NEW), f"id {number}", f"{ROWS} rows", "resize"):
        assert part in str(error.value), part


CALLS = {
    "generate": lambda model, params, tokenizer: jlora.generate(model, params, tokenizer, [f"one {NEW}"]),
    "generate, chats": lambda model, params, tokenizer: jlora.generate(
        model, params, tokenizer, [CHAT["messages"][:1]]
    ),
    "a bank": lambda model, params, tokenizer: jlora.generate(
        model, bank(params), tokenizer, [f"one {NEW}"], adapters=["one"]
    ),
    "evaluate": lambda model, params, tokenizer: evaluate(
        model, params, tokenizer, [{"prompt": "one", "completion": NEW}], generate_texts=False
    ),
    "questions": lambda model, params, tokenizer: forgetting.answers(
        model, params, tokenizer, [{"question": "one", "choices": ["two", NEW], "answer": 0}]
    ),
    "sensitivity": lambda model, params, tokenizer: sensitivity.divergence(model, params, params, tokenizer, [TEXT]),
}


def bank(params):
    adapter = jlora.lora.init(params, jlora.LoraConfig(r=2), jax.random.key(0))
    return jlora.lora.Bank.of(params, {"one": adapter})


@pytest.mark.parametrize("call", CALLS)
def test_every_function_that_makes_tokens_refuses_those_without_a_row(call, wide, loaded):
    with pytest.raises(jlora.UserError) as error:
        CALLS[call](*loaded)
    said(error, wide)


def test_the_harness_refuses_tokens_without_a_row(wide, loaded):
    harness = pytest.importorskip("jlora.harness")
    from lm_eval.api.instance import Instance

    model = harness.JaxLM(*loaded, max_length=64)
    asked = {
        "loglikelihood": ("one ", NEW),
        "loglikelihood_rolling": (f"one {NEW}",),
        "generate_until": (f"one {NEW}", {"until": ["."]}),
    }
    for kind, arguments in asked.items():
        with pytest.raises(jlora.UserError) as error:
            getattr(model, kind)([Instance(kind, {}, arguments, 0)])
        said(error, wide)


COMMANDS = {
    "generate": lambda folder, file: ["generate", f"--model={folder}", f"--prompt=one {NEW}"],
    "eval": lambda folder, file: ["eval", f"--model={folder}", f"--data={file}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_tokens_without_a_row(command, wide, tmp_path, capsys):
    file = write(tmp_path / "data.jsonl", [GOOD, TEXT])
    assert main(COMMANDS[command](wide, file)) == 2
    message = capsys.readouterr().err
    assert repr(NEW) in message
    assert "--vocab" in message


def test_token_ids_from_outside_are_compared_with_the_rows_too(loaded):
    model, params, _ = loaded
    for wrong in (ROWS, -1):
        ids = np.array([[1, 2, wrong]], np.int32)
        with pytest.raises(jlora.UserError, match=rf"{wrong}.*{ROWS} rows"):
            model(params, ids)
        with pytest.raises(jlora.UserError, match=rf"{wrong}.*{ROWS} rows"):
            example_sums(model, params, [Example(ids[0], ids[0] > 0)], batch_size=1, seq_len=8)
        with pytest.raises(jlora.UserError, match=rf"{wrong}.*{ROWS} rows"):
            keys = jax.random.split(jax.random.key(0), 1)
            rollout(model, params, ids.tolist(), keys, rows=1, max_new_tokens=2, stop_ids=(0,))
    assert model(params, ids[:, :2]).shape == (1, 2, ROWS)


def test_what_the_tokenizer_has_beyond_the_rows_is_no_fault_where_no_text_has_it(loaded, wide, tmp_path):
    model, params, tokenizer = loaded
    assert len(jlora.generate(model, params, tokenizer, ["one"], max_new_tokens=2)) == 1
    settings = {"model": {"path": wide}, "data": {"path": write(tmp_path / "d.jsonl", [GOOD])}}
    run(resolve(settings | {"train": {"steps": 1, "batch_size": 1}}), tmp_path / "run")


def test_a_stop_token_without_a_row_is_refused_where_it_is_the_only_one(loaded, wide, tmp_path):
    model, params, _ = loaded
    tokenizer = jlora.load_tokenizer(wide)
    tokenizer.eos_token = NEW
    tokenizer.chat_template = None
    with pytest.raises(jlora.UserError) as error:  # what is trained ends with it
        evaluate(model, params, tokenizer, [GOOD], generate_texts=False)
    said(error, wide)
    assert jlora.generate(model, params, tokenizer, ["one"], max_new_tokens=2)  # config.json has another
    without = models.build({**model.config.to_hf(), "eos_token_id": None})
    with pytest.raises(jlora.UserError) as error:
        jlora.generate(without, params, tokenizer, ["one"])
    said(error, wide)


def test_a_fitted_tokenizer_is_the_tokenizer_otherwise(loaded):
    _, _, tokenizer = loaded
    fitted = data.fitted(tokenizer, ROWS)
    assert fitted("one")["input_ids"] == tokenizer("one")["input_ids"]
    assert fitted(["one", "two"])["input_ids"] == tokenizer(["one", "two"])["input_ids"]
    assert fitted.encode("one") == tokenizer.encode("one")
    assert fitted.decode([1, 2, 3]) == tokenizer.decode([1, 2, 3])
    assert fitted.chat_template == tokenizer.chat_template
    assert data.fitted(fitted, ROWS + 100).rows == ROWS + 100
    for call in (fitted, fitted.encode):
        with pytest.raises(jlora.UserError, match=re.escape(NEW)):
            call(f"one {NEW}")


def test_a_run_on_a_resized_base_trains_the_new_tokens_and_what_it_leaves_opens(wide, tmp_path, capsys):
    """From the run to every command that reads what it left, each with the rows of the tokenizer."""
    rows = len(jlora.load_tokenizer(wide))
    file = write(tmp_path / "data.jsonl", [TEXT, CHAT] * 2)
    settings = {
        "model": {"path": wide, "resize_vocab": "tokenizer"},
        "data": {"path": file},
        "lora": {"r": 2, "trainable_token_indices": (rows - 1,)},
        "train": {"steps": 2, "batch_size": 2, "seq_len": 64, "save_every": 1},
    }
    out = tmp_path / "run"
    assert np.isfinite(run(resolve(settings), out)["loss"])
    run(resolve(settings), out)  # goes on, with nothing left to do: the base is the one that it began with
    model, params = jlora.load(wide, vocab=rows)
    adapted = jlora.load_adapter(params, out / "adapter")
    ids = np.array([[1, 2, rows - 1]], np.int32)
    opened = transformers.AutoModelForCausalLM.from_pretrained(wide)
    opened.resize_token_embeddings(rows)
    opened = peft.PeftModel.from_pretrained(opened, out / "adapter")
    with torch.no_grad():
        expected = opened(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(model(adapted, ids), expected, atol=1e-4)

    assert main(["export", f"--workdir={out}", "--merged", f"--out={tmp_path / 'merged'}"]) == 0
    whole, merged = jlora.load(tmp_path / "merged")
    assert whole.config.vocab_size == rows
    np.testing.assert_allclose(whole(merged, ids), expected, atol=1e-4)

    given = [f"--model={wide}", f"--adapter={out / 'adapter'}"]
    for command, more in (("eval", [f"--data={file}", "--loss_only"]), ("generate", [f"--prompt=one {NEW}"])):
        assert main([command, *given, *more]) == 2
        assert f"--vocab={rows}" in capsys.readouterr().err
        for vocab in (rows, "tokenizer"):
            assert main([command, *given, *more, f"--vocab={vocab}"]) == 0
    assert main(["merge", *given, "--vocab=tokenizer", f"--out={tmp_path / 'again'}"]) == 0
    assert jlora.load(tmp_path / "again")[0].config.vocab_size == rows
    assert main(["quantize", f"--model={wide}", "--quant=int8", f"--vocab={rows}", f"--out={tmp_path / 'packed'}"]) == 0
    assert jlora.load(tmp_path / "packed")[0].config.vocab_size == rows


def test_a_number_of_rows_is_given_on_the_command_line_too(wide, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from jlora.train.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        f"    config.model.path = {wide!r}\n    config.train.steps = 1\n    config.train.batch_size = 1\n"
        f"    config.data.path = {write(tmp_path / 'd.jsonl', [TEXT])!r}\n    return config\n"
    )
    for vocab in (300, "tokenizer"):
        out = tmp_path / f"run{vocab}"
        assert main(["train", f"--config={recipe}", f"--workdir={out}", f"--config.model.resize_vocab={vocab}"]) == 0
        assert json.loads((out / "config.json").read_text())["model"]["resize_vocab"] == vocab


def test_rows_that_an_adapter_brought_stay_with_it_through_every_command(wide, tmp_path):
    """No option says that there are any: the adapter does."""
    model, params = jlora.load(wide)
    table = params["embed_tokens"]["embedding"] * 1.5
    other = jlora.lora.init(params | {"embed_tokens": {"embedding": table}}, jlora.LoraConfig(r=2), jax.random.key(0))
    start = tmp_path / "start"
    jlora.save_adapter(start, other, base=wide, save_embedding_layers=True)
    settings = {
        "model": {"path": wide, "adapter": str(start)},
        "data": {"path": write(tmp_path / "data.jsonl", [GOOD] * 2)},
        "train": {"steps": 1, "batch_size": 2, "seq_len": 64, "fold": True},
        "optim": {"learning_rate": 1e-12},
    }
    run(resolve(settings), tmp_path / "run")
    assert main(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'exported'}"]) == 0
    given = ["merge", f"--model={wide}", f"--adapter={start}", "--adapter_only"]
    assert main([*given, f"--out={tmp_path / 'again'}"]) == 0
    assert main([*given, "--fold", f"--out={tmp_path / 'folded'}"]) == 0
    ids = np.array([[1, 2, 3]], np.int32)
    for folder in (tmp_path / "run" / "adapter", tmp_path / "exported", tmp_path / "again", tmp_path / "folded"):
        found = model(jlora.load_adapter(params, folder), ids)
        np.testing.assert_allclose(found, model(other, ids), atol=1e-4, err_msg=str(folder))


def test_a_run_goes_on_from_an_adapter_that_brings_rows(wide, tmp_path):
    rows = len(jlora.load_tokenizer(wide))
    model, params = jlora.load(wide, vocab=rows)
    table = params["embed_tokens"]["embedding"].at[ROWS:].add(0.5)
    params = params | {"embed_tokens": {"embedding": table}}
    params = jlora.lora.init(params, jlora.LoraConfig(r=2, init_lora_weights=False), jax.random.key(0))
    jlora.save_adapter(tmp_path / "start", params, base=wide, save_embedding_layers=True)
    settings = {
        "model": {"path": wide, "resize_vocab": rows, "adapter": str(tmp_path / "start")},
        "data": {"path": write(tmp_path / "data.jsonl", [TEXT] * 2)},
        "train": {"steps": 1, "batch_size": 2, "seq_len": 64},
        "optim": {"learning_rate": 1e-12},
    }
    run(resolve(settings), tmp_path / "run")
    run(resolve(settings), tmp_path / "run")
    ids = np.array([[1, 2, rows - 1]], np.int32)
    _, _, left = load_run(tmp_path / "run")
    _, base = jlora.load(wide, vocab=rows)
    for found in (left, jlora.load_adapter(base, tmp_path / "run" / "adapter")):
        np.testing.assert_allclose(model(found, ids), model(params, ids), atol=1e-4)
