"""Whatever a user gets wrong ends with code 2 and one message; only real failures show a traceback."""

import errno
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from jlora.cli import eval as eval_command
from jlora.cli.main import COMMANDS, main
from jlora.errors import ExistingFileError, MissingFileError, MissingPackageError, UnknownNameError, UserError
from jlora.types import require

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "'trian' is not a command; the commands are " + ", ".join(COMMANDS),
        ),
        (["train"], "--config"),
        (["train", "--config=nowhere.py"], "nowhere.py is not a file"),
        (["train", "--config={folder}/empty.py"], "defines no function get_config()"),
        (["train", "--config={folder}/broken.py"], "broken.py, line 2: SyntaxError"),
        (["train", "--config={folder}/failing.py"], "failing.py, line 2: ZeroDivisionError"),
        (["train", "--config={folder}/dict.py"], "get_config() returned dict, expected an ml_collections.ConfigDict"),
        (["train", "--config={recipe}", "--config.lora.rnk=8"], "lora.rnk: unknown key; did you mean lora.r?"),
        (["train", "--config={recipe}", "--config.lroa.r=8"], "lroa.r: unknown key; did you mean lora.r?"),
        (["train", "--config={recipe}", "--config.lr=8"], "lr: unknown key; did you mean optim.learning_rate?"),
        (["train", "--config={recipe}", "--config.lora.r=many"], "--config.lora.r=many: invalid literal for int()"),
        (["train", "--config={recipe}", "--config.train.steps=0"], "train.steps: found 0, expected at least 1"),
        (["train", "--config={recipe}", "--config.model.quant=int3"], "int3"),
        (
            ["train", "--config={recipe}", "--config.algorithm=gpo"],
            "algorithm: found 'gpo' (str), expected one of 'sft'",
        ),
        (["train", "--config={recipe}", "--lora.r=8"], "unknown option --lora.r"),
        (["train", "--config={recipe}", "extra"], "unexpected 'extra'"),
        (["train", "--config={recipe}", "--workdir={folder}/w", "--config.data.path=no.jsonl"], "no.jsonl"),
        (["train", "--config={recipe}", "--workdir={folder}/w", "--config.model.path={folder}/no"], "/no"),
        (["eval", "--model={model}"], "--data"),
        (["eval", "--model={model}", "--data=no.jsonl"], "no.jsonl"),
        (["eval", "--model={model}", "--data={data}", "--metric=no.py"], "no.py"),
        (["eval", "--model={folder}/no", "--data={data}"], "/no"),
        (["eval", "--model={model}", "--data={data}", "--batch_size=0"], "found 0, expected at least 1"),
        (["eval", "--model={model}", "--data={data}", "--quant=nf5"], "nf5"),
        (["generate", "--model={model}"], "--prompt"),
        (["generate", "--model={model}", "--prompt=x", "--temperature=-1"], "found -1.0"),
        (["generate", "--model={model}", "--prompt=x", "--adapter={folder}/no"], "/no"),
        (["generate", "--model={model}", "--prompt=x", "--raw", "--system=y"], "--system needs a chat template"),
        (["merge", "--model={model}", "--out={folder}/o"], "--model and --adapter are required, or --recipe"),
        (["merge", "--recipe=a.yaml", "--model={model}", "--seed=1", "--out={folder}/o"], "--model, --seed: not with"),
        (["merge", "--recipe={folder}/no.yaml", "--out={folder}/o"], "no.yaml"),
        (["export", "--out={folder}/o"], "--workdir"),
        (["export", "--workdir={folder}/no", "--out={folder}/o"], "/no"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(arguments, message, tmp_path, recipe, model_folder, data_file, capfd):
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("x = 1\ndef get_config(:\n")
    (tmp_path / "failing.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp_path / "dict.py").write_text("def get_config():\n    return {}\n")
    names = {"folder": tmp_path, "recipe": recipe, "model": model_folder, "data": data_file}
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_all_faults_of_the_settings_come_in_one_message(recipe, capsys):
    changes = ["--config.train.stps=3", "--config.train.seq_len=1", "--config.lora.r=-1"]
    assert main(["train", f"--config={recipe}", *changes]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in ("train.stps", "train.seq_len", "r=-1"))


def test_no_command_shows_the_commands_and_is_a_mistake(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: jlora {name} ")
    assert max(map(len, text.splitlines())) <= 120


def test_every_setting_is_in_the_help_of_train(capsys):
    main(["train", "--help"])
    text = capsys.readouterr().out
    assert re.search(r"--config\.model\.path +str; required", text)
    assert re.search(r"--config\.train\.batch_size +int; default 4\n +rows of a micro-batch", text)


def test_the_help_of_train_may_be_of_one_group_or_setting(capsys):
    for word, first, names in (
        ("lora", "lora: The settings of", {"lora"}),
        ("config.lora.r", "lora: The settings of", {"lora"}),
        ("algorithm", "  --config.algorithm  one of 'sft'", {"algorithm"}),
    ):
        assert main(["train", "--help", word]) == 0
        text = capsys.readouterr().out
        assert text.startswith(first)
        assert set(re.findall(r"^  --config\.(\w+)", text, re.M)) == names
    assert len(re.findall(r"^  --config", text, re.M)) == 1
    assert main(["train", "--help=lroa"]) == 2
    assert "'lroa' is neither a group of settings nor a setting; did you mean lora?" in capsys.readouterr().err


def raise_it(monkeypatch, error):
    def run(options):
        raise error

    monkeypatch.setattr(eval_command, "run", run)
    return main(["eval", "--model=m", "--data=d"])


@pytest.mark.parametrize(
    "kind", [UserError, MissingFileError, ExistingFileError, UnknownNameError, MissingPackageError]
)
def test_a_mistake_is_its_message_alone(monkeypatch, capsys, kind):
    assert raise_it(monkeypatch, kind("first line\nsecond line")) == 2
    assert capsys.readouterr().err == "jlora: first line\nsecond line\n"


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ValueError, KeyError, ImportError, FileNotFoundError])
def test_a_fault_of_the_program_is_left_to_python(monkeypatch, kind):
    # Python prints the traceback and exits with 1.
    with pytest.raises(kind):
        raise_it(monkeypatch, kind("boom"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nmore"), "(Out of memory: 9 bytes.)"),
        (MemoryError("no room for 3 arrays"), "(no room for 3 arrays)"),
        (MemoryError(), "(of this machine)"),
    ],
)
def test_too_little_memory_is_told_in_a_line_with_what_to_do(monkeypatch, capsys, error, said):
    assert raise_it(monkeypatch, error) == 1
    assert capsys.readouterr().err == f"jlora: out of memory {said}; --quant, fewer rows and shorter texts need less\n"


FULL_DISK = """
import asyncio, gc, os, sys, threading
from jlora.cli import main as cli

async def write(error):
    raise error

async def writes(error):
    task = asyncio.ensure_future(write(error))
    await asyncio.wait([task])
    del task
    gc.collect()

class Gone:
    def __init__(self, error):
        self.error = error
    def __del__(self):
        raise self.error

def follow(error):
    def fails():
        raise error
    asyncio.run(writes(error))
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    Gone(error)

cli._run = lambda *_: cli._complain("the disk is full", cli.FAILED)
code = cli.main(["train"])
for error in (OSError({errno}, os.strerror({errno})), RuntimeError({closed!r}), ValueError({written!r})):
    follow(error)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("number", "closed", "written", "told"),
    [(errno.EFBIG, "Event loop is closed", "Failed writing: no [os_error_code='27']", 0), (errno.EIO, "?", "?", 9)],
)
def test_what_fails_after_a_full_disk_is_told_adds_no_traceback(number, closed, written, told):
    """Tasks of an event loop, threads and destructors: however late they come. Other errors are still shown."""
    code = FULL_DISK.format(errno=number, closed=closed, written=written)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert done.stderr.startswith("jlora: the disk is full\n")
    assert done.stderr.count("Traceback") == told, done.stderr


def test_an_extra_that_is_not_installed_is_a_mistake():
    with pytest.raises(MissingPackageError, match="jlora\\[gguf\\]"):
        require("no_such_package", "gguf")


def test_the_traceback_of_a_mistake_is_shown_on_request(capsys):
    assert main(["--traceback", "train", "--config=nowhere.py"]) == 2
    assert "Traceback" in capsys.readouterr().err


LOADED = """
import sys
from jlora.cli.main import main
from jlora.cli.parsers import COMMANDS

helps = [[name, "--help"] for name in COMMANDS]
for arguments in (["--help"], ["--version"], ["nonsense"], ["eval", "--x"], *helps):
    main(arguments)
    loaded = {"jax", "transformers", "numpy", "rich", "yaml"} & set(sys.modules)
    assert not loaded, (arguments, loaded)
"""


def test_help_and_mistakes_of_spelling_need_no_jax():
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_jlora_is_the_command():
    done = subprocess.run([sys.executable, "-m", "jlora", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: jlora COMMAND")


WARNING = """
import sys, types, warnings
from jlora.cli.main import main

def run(options):
    for _ in range(2):
        warnings.warn("a.json: fields that are ignored:\\n  x\\n")
        with warnings.catch_warnings():  # as libraries do; Python forgets what it has said
            warnings.simplefilter("ignore")
            warnings.warn("nobody wants it")
    warnings.warn("a.json: fields that are ignored:\\n  x\\n", FutureWarning)
    warnings.warn("another")
    warnings.warn("for developers", DeprecationWarning)
    return 0

sys.modules["jlora.cli.eval"] = types.SimpleNamespace(run=run)
assert main(["eval", "--model=m", "--data=d"]) == 0
warnings.warn("in Python's form again")
"""


def test_a_warning_is_said_once_and_without_a_place_in_the_code():
    arguments = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", WARNING]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == (
        "warning: a.json: fields that are ignored:\n  x\nwarning: another\n"
        "<string>:18: UserWarning: in Python's form again\n"
    )


def test_compiled_programs_are_kept_unless_something_says_where(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    before, most = jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        for arguments in (["train", "--help"], ["train"], ["plan", "--config=nowhere.py", "--topology=cpu"]):
            main(arguments)
            assert jax.config.jax_compilation_cache_dir is None
        assert main(["train", "--config=nowhere.py"]) == 2
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / ".cache" / "jlora" / "compiled"))
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        assert main(["train", "--config=nowhere.py"]) == 2
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_compilation_cache_max_size", most)


# Much text, and little, which is kept back until the end.
@pytest.mark.parametrize("options", [[], ["sft", "--out={folder}/mine.py"]])
def test_output_that_nobody_reads_is_said_in_a_line(tmp_path, options):
    command = [sys.executable, "-m", "jlora", "recipes", *(option.format(folder=tmp_path) for option in options)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == "jlora: whoever read the output is gone\n"
    assert process.returncode == 1


def test_a_place_that_the_system_refuses_is_a_mistake(tmp_path, capsys):
    assert main(["recipes", "sft", f"--out={tmp_path}/{'x' * 300}.py"]) == 2
    assert capsys.readouterr().err.endswith("File name too long\n")
