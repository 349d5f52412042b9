"""The recipes of jlora are found by name, and are in the wheel."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

from jlora.cli.main import main
from jlora.cli.overrides import read_config, read_run
from jlora.errors import MissingFileError
from jlora.train.config import resolve

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def test_each_recipe_has_a_line_with_its_algorithm_its_model_and_what_to_give(capsys):
    assert main(["recipes"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["recipe", "algorithm", "model", "give"]
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in CONFIGS.glob("*.py"))
    for line in lines:
        name, algorithm, model, needs = line.split(maxsplit=3)
        config = read_config(str(CONFIGS / f"{name}.py"), [])
        assert (algorithm, model) == (config.algorithm, config.model.path or "yours")
        assert "data.path" in needs or name == "reasoning_grpo"


def test_a_recipe_is_printed_or_copied_and_nothing_is_written_over(tmp_path, capsys):
    text = (CONFIGS / "dpo.py").read_text()
    assert main(["recipes", "dpo"]) == 0
    assert capsys.readouterr().out == text
    out = tmp_path / "mine.py"
    assert main(["recipes", "dpo", f"--out={out}"]) == 0
    assert out.read_text() == text
    out.write_text("mine")
    assert main(["recipes", "dpo", f"--out={out}"]) == 2
    assert "mine.py: there is a file already; choose another name, or say --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["recipes", "sft", f"--out={out}", "--force"]) == 0
    assert out.read_text() == (CONFIGS / "sft.py").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stf"], "stf is not a file, and not the name of one of jlora's recipes; did you mean sft?"),
        (["xyz"], "they are dpo, function_calling_dpo"),
        (["--out=x.py"], "--out writes a copy of one recipe: give its NAME too"),
        (["sft", "--out={folder}"], "found a folder, expected a file"),
        (["sft", "--out={folder}/no/x.py"], "found no folder"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    assert main(["recipes", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_configured_by_a_recipes_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--config.model.path=m", "--config.data.path=d", "--config.train.steps=3"]
    assert read_run("sft", given) == resolve(read_config(str(CONFIGS / "sft.py"), given))
    judged = [*given, "--config.rollout.rewards=('a.py',)"]
    assert read_run("grpo:dr_grpo", judged).grpo.loss_type == "dr_grpo"
    with pytest.raises(MissingFileError, match=r"smolm2 is not a file.*did you mean smollm2_135m\?"):
        read_config("smolm2", [])
    (tmp_path / "grpo").mkdir()
    (tmp_path / "runs").mkdir()
    assert read_run("grpo:dr_grpo", judged).grpo.loss_type == "dr_grpo"
    with pytest.raises(MissingFileError, match="runs is a folder, and not the name of one of jlora's recipes"):
        read_config("runs", [])
    with pytest.raises(MissingFileError, match=r"\./grpo"):  # a path means what lies there
        read_config("./grpo", [])
    (tmp_path / "sft").write_text("def get_config():\n    return None\n")  # a file of that name comes first
    with pytest.raises(ValueError, match="returned NoneType"):
        read_config("sft", [])


LISTED = """
import sys
from jlora.cli.main import main

assert main(["recipes"]) == 0
assert main(["recipes", "sft", "--out=mine.py"]) == 0
assert not {"jax", "numpy"} & set(sys.modules), "listing needs no JAX"
import jlora
assert "site" in jlora.__file__, jlora.__file__
"""


def test_the_wheel_has_the_recipes(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("jlora-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    names = {path.name for path in (tmp_path / "site" / "jlora" / "recipes").glob("*.py")}
    assert names == {path.name for path in CONFIGS.glob("*.py")}
    code = f"import sys\nsys.path.insert(0, {str(tmp_path / 'site')!r})\n{LISTED}"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "smollm2_135m" in done.stdout
    assert (tmp_path / "mine.py").read_text() == (CONFIGS / "sft.py").read_text()
