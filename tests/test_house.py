"""What the package knows is spelled no more often than it was, and house.py counts code alone."""

import importlib.util
import pathlib

import pytest

from jlora.families import FAMILIES

SPEC = importlib.util.spec_from_file_location("house", pathlib.Path(__file__).parent / "house.py")
house = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(house)

# With room for what new families, kinds and algorithms say in their own files.
CEILINGS = {
    "names of adapter leaves": (50, 25),
    "tied embedding and head": (24, 14),
    # once in each family's own file, and those that GGUF calls so too
    "names of model types": (len(FAMILIES) + 30, len(FAMILIES) + 8),
    "isinstance of packed kinds": (1, 1),
    "is_packed": (27, 13),
    "names of algorithms": (60, 30),
    "PEFT's matching rules": (16, 5),
    "paths cut by hand": (76, 28),
}


@pytest.fixture(scope="module")
def counted():
    return house.count()


@pytest.mark.parametrize("knowledge", house.KNOWLEDGE)
def test_no_knowledge_is_spelled_more_often_or_in_more_files(counted, knowledge):
    (spelled, files), (most_spelled, most_files) = counted[knowledge], CEILINGS[knowledge]
    assert spelled <= most_spelled and files <= most_files, f"{spelled} times in {files} files: give it a table"


def test_docstrings_and_comments_do_not_count(tmp_path):
    (tmp_path / "one.py").write_text(
        '"""Of "lora_a" and\n"dpo"."""\n\n\ndef f(x):\n    """is_packed"""\n    return x["lora_a"]  # lora_a, "sft"\n'
    )
    (tmp_path / "two.py").write_text('KIND = isinstance(leaf, (Rounded, int)), path.rpartition("/"), "a/dpo", "kto"\n')
    found = {name: counts for name, counts in house.count(tmp_path).items() if counts[0]}
    assert found == {
        "names of adapter leaves": (1, 1),
        "isinstance of packed kinds": (1, 1),
        "names of algorithms": (1, 1),
        "paths cut by hand": (1, 1),
    }


def test_the_tables_are_printed(capsys):
    house.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*house.KNOWLEDGE, "jlora/lora", "all"))


def test_every_file_is_called_after_what_it_holds():
    root = pathlib.Path(__file__).parent.parent
    nameless = {"util", "utils", "common", "helper", "helpers", "base", "misc"}
    files = [path for folder in ("jlora", "tests", "configs", "benchmarks") for path in (root / folder).rglob("*.py")]
    assert [path for path in files if path.stem.strip("_") in nameless or path.parent.name in nameless] == []
