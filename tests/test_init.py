"""`import jlora` loads nothing, and what it offers is the same in whatever order it is used."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jlora

ROOT = pathlib.Path(__file__).parent.parent


def run(code):
    """What Python prints for the code, in a process of its own that has imported nothing of jlora."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_loads_no_part_of_it_and_no_jax():
    found = run("import sys, jlora; dir(jlora); print(*sys.modules)").split()
    assert [name for name in found if name.startswith(("jlora", "jax", "numpy"))] == ["jlora"]


@pytest.mark.parametrize("name", jlora.__all__)
def test_a_name_leads_to_what_it_says(name):
    found = getattr(jlora, name)
    assert found is getattr(__import__("jlora", fromlist=[name]), name)
    assert getattr(found, "__name__", name).rpartition(".")[2] == name
    assert name in dir(jlora)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "jlora" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    homes = {name: jlora._HOMES.get(name, "jlora") for name in jlora.__all__}
    assert seen == homes


def test_parts_are_found_and_other_names_are_not():
    assert jlora.train.run.__module__ == "jlora.train.loop"
    for name in ("nonsense", "_nonsense"):
        assert not hasattr(jlora, name)
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from jlora import nonsense  # noqa: F401


def test_an_error_within_a_part_is_not_taken_for_a_missing_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    for name in [name for name in sys.modules if name.startswith("jlora.data")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(jlora, "data", raising=False)
    with pytest.raises(ModuleNotFoundError, match="grain"):
        jlora.data  # noqa: B018


# What may come first: each imports the part of the package that has the name of the function.
USES = {
    "module": "import jlora.generate.decoding",
    "names": "from jlora.generate import decode, sample; assert callable(decode) and callable(sample)",
    "function": "from jlora import generate; assert type(generate) is type(lambda: None), generate",
    "attribute": "import jlora; assert type(jlora.generate) is type(lambda: None), jlora.generate",
}


# Each begins an order, in a child of its own that has what jlora builds on, and nothing of jlora.
ORDERS = """
import os, sys
import flax.linen, grain, jax, orbax.checkpoint

uses = {uses!r}
for first in uses:
    order = [first, *(use for use in uses if use != first)]
    child = os.fork()
    if not child:
        try:
            for use in order:
                exec(uses[use] + "\\nimport jlora\\n" + uses["attribute"])
        except BaseException as error:
            print(order, repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_generate_is_the_function_in_every_order():
    run(ORDERS.format(uses=USES))
