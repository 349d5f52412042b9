"""A file imports only from lower levels, and packages of one level do not import each other."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
LEVELS = (
    ("errors",),
    ("families",),
    ("allocator", "devices", "ends", "names", "tree", "types"),
    ("sharding",),
    ("kernels",),
    ("quant",),
    ("lora",),
    ("models",),
    ("hub", "data", "losses", "optim"),
    ("checkpoint", "generate"),
    ("serve", "train"),
    ("cli", "harness"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# The front door: they re-export what lies below, and nothing in the package imports from them.
FRONT = ("__init__", "__main__")


def part(path):
    """'lora' for jlora/lora/merging.py, 'tree' for jlora/tree.py."""
    return path.relative_to(ROOT / "jlora").parts[0].removesuffix(".py")


def imported_parts(tree, here="", known=LEVEL):
    """Every part of jlora that the code imports, at whatever depth of functions and conditions.

    Imports under `if TYPE_CHECKING:` are for annotations only and make nothing run.
    """
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "jlora"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{here}:{node.lineno}: relative import"
            if node.module == "jlora":
                names = [f"jlora.{alias.name}" for alias in node.names]
            elif (node.module or "").startswith("jlora."):
                names = [node.module]
        for name in names:
            parts = name.split(".")
            assert len(parts) > 1 and parts[1] in known, (
                f"{here}:{node.lineno}: import {name!r} names no part of the package"
            )
            yield node.lineno, parts[1]


def violations(part_name, tree, here):
    for line, other in imported_parts(tree, here):
        if other != part_name and LEVEL[other] >= LEVEL[part_name]:
            yield f"{here}:{line}: {part_name} (level {LEVEL[part_name]}) imports {other} (level {LEVEL[other]})"


def sources():
    return [path for path in sorted((ROOT / "jlora").rglob("*.py")) if part(path) not in FRONT]


def test_every_part_of_the_package_has_a_level():
    unknown = {part(path) for path in sources()} - set(LEVEL)
    assert not unknown, f"no level for {sorted(unknown)}: see LEVELS above"


def test_no_module_has_the_name_of_a_function_that_its_package_exports():
    """Otherwise `jlora.lora.merge` is sometimes the function and sometimes the module."""
    problems = []
    for init in sorted((ROOT / "jlora").rglob("__init__.py")):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        imports = [node for node in ast.walk(ast.parse(init.read_text())) if isinstance(node, ast.ImportFrom)]
        nodes = [node for node in imports if node.module != package]  # which exports modules
        exported = {alias.asname or alias.name for node in nodes for alias in node.names}
        modules = {path.stem for path in init.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
        problems += [f"{init.parent.relative_to(ROOT)}: {name}" for name in sorted(exported & modules)]
    assert problems == ["jlora: generate"], problems  # that function is called like its part of the package by design


def test_imports_go_down():
    problems = [
        problem
        for path in sources()
        for problem in violations(part(path), ast.parse(path.read_text()), path.relative_to(ROOT))
    ]
    assert not problems, "\n".join(problems)


def test_imports_inside_functions_and_of_equals_are_seen():
    code = "def f():\n    from jlora import train\n    import jlora.data.chat\n    from jlora.tree import flatten\n"
    assert [problem.split(": ")[1] for problem in violations("hub", ast.parse(code), "x")] == [
        "hub (level 8) imports train (level 10)",
        "hub (level 8) imports data (level 8)",
    ]


def test_annotation_imports_do_not_count():
    code = "if typing.TYPE_CHECKING:\n    from jlora.models import Model\n"
    assert not list(violations("tree", ast.parse(code), "x"))


def test_torch_is_not_imported():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torch" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch")
    ]
    assert not found
