"""Completion as a real bash asks for it; what zsh and fish ask for by the same variables."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from jlora.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
# Reads a line, asks as bash does when TAB is pressed at its end, and prints what came, with a blank line after it.
ASK = """
eval "$(jlora completion bash)"
while IFS= read -r COMP_LINE; do
    COMP_POINT=${#COMP_LINE}
    COMPREPLY=()
    _python_argcomplete jlora
    printf '%s\\n' "${COMPREPLY[@]}" "-"
done
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a program called jlora, and files."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "jlora").write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m jlora "$@"\n')
    (folder / "jlora").chmod(0o755)
    (folder / "data").mkdir()
    for name in ("data.jsonl", "mine.yaml", "mine.txt"):
        (folder / name).touch()
    return folder


def ask(place, *lines):
    """The completions of each line."""
    environment = {"PATH": f"{place}:/usr/bin:/bin", "HOME": str(place)}
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK],
        input="".join(f"{line}\n" for line in lines),
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [[word.strip() for word in part.split("\n") if word.strip()] for part in done.stdout.split("-\n")[:-1]]


def test_bash_completes_commands_options_values_settings_and_files(place):
    asked = {
        "jlora ": ["train", "data", "plan"],
        "jlora qu": ["quantize"],
        "jlora recipes sm": ["smollm2_135m"],
        "jlora plan --config s": ["sft", "smollm2_135m"],
        "jlora train --config mi": ["mine.yaml"],
        "jlora completion ": ["--help", "bash", "fish", "zsh"],
        "jlora merge --qu": ["--quant"],
        "jlora merge --method ti": ["ties"],
        "jlora merge --method=ti": ["ties"],
        "jlora train --help": ["--help"],
        "jlora export --experts ": ["each", "stacked"],
        "jlora plan --topology=h10": ["h100"],
        "jlora train --config.lora.init": ["--config.lora.init_lora_weights"],
        "jlora train --config.train.experts=": ["each", "stacked"],
        "jlora train --config.train.load_best f": ["false"],
        "jlora eval --data da": ["data.jsonl", "data/"],
        "jlora train --config.data.path=da": ["data.jsonl", "data/"],
        "jlora serve --rows ": [],
    }
    found = dict(zip(asked, ask(place, *asked), strict=True))
    assert set(asked["jlora "]) < set(found.pop("jlora "))
    assert {line: sorted(words) for line, words in found.items()} == {line: asked[line] for line in found}


def test_settings_are_offered_once_one_is_begun(place):
    begun, other = ask(place, "jlora train --config.mesh", "jlora train --")
    assert begun == [f"--config.mesh.{axis}" for axis in ("data", "fsdp", "tensor", "sequence")]
    assert "--workdir" in other and not [word for word in other if word.startswith("--config.")]


def test_each_shell_has_its_code(place, capsys):
    for shell, words in (("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command jlora")):
        assert main(["completion", shell]) == 0
        code = capsys.readouterr().out
        assert words in code
        if program := shutil.which(shell):
            subprocess.run([program, "-n"], input=code, text=True, check=True)
    assert main(["completion", "cmd"]) == 2


def test_without_the_package_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'jlora[completion]'" in capsys.readouterr().err
