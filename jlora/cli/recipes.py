"""`jlora recipes`: the recipes that come with jlora, which `--config` takes by name."""

import argparse
import ast
import difflib
import functools
import inspect
import os
import pathlib
import re
from typing import NamedTuple

from jlora.errors import ExistingFileError, MissingFileError, UserError

PACKAGE = pathlib.Path(__file__).parents[1]


class Recipe(NamedTuple):
    """A recipe, as its source tells.

    Attributes:
        model: the base that it names; "" if the user gives one.
        needs: the settings that the user gives.
        title: its first sentence.
    """

    name: str
    path: pathlib.Path
    algorithm: str
    model: str
    needs: str
    title: str


def run(options: argparse.Namespace) -> int:
    """Lists the recipes, prints one or writes a copy, and returns 0; mistakes raise."""
    if options.name is None:
        if options.out:
            raise UserError("--out writes a copy of one recipe: give its NAME too")
        print("\n".join(_table()))
        return 0
    recipe = _recipe(options.name)
    text = recipe.path.read_text(encoding="utf-8")
    if not options.out:
        print(text, end="")
        return 0
    _write(pathlib.Path(options.out), text, force=options.force)
    print(f"{recipe.name}: {options.out} (jlora train --config={options.out})")
    return 0


@functools.cache
def recipes() -> dict[str, Recipe]:
    """The recipes by name, sorted."""
    inside = PACKAGE / "recipes"  # as installed; a clone has them beside the package
    folder = inside if inside.is_dir() else PACKAGE.parent / "configs"
    return {path.stem: _read(path) for path in sorted(folder.glob("*.py"))}


def located(config: str) -> str:
    """What --config names, as a file: a recipe's name becomes its file's, with the word behind it.

    A file of that name comes first; a folder does not, since no recipe can be read from one.

    Raises:
        FileNotFoundError: it looks like a name, and no recipe and no file has it.
    """
    name, colon, word = config.partition(":")
    path = pathlib.Path(name)
    if path.is_file() or path.suffix or name != path.name:
        return config
    return f"{_recipe(name).path}{colon}{word}"


def _recipe(name: str) -> Recipe:
    found = recipes()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(found)}"
        what = "is a folder" if pathlib.Path(name).is_dir() else "is not a file"
        raise MissingFileError(f"{name} {what}, and not the name of one of jlora's recipes; {hint}")
    return found[name]


def _read(path: pathlib.Path) -> Recipe:
    """The recipe of a file, which is read and not run, since that takes JAX."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = inspect.cleandoc(ast.get_docstring(tree) or "")
    given = {
        ast.unparse(node.targets[0]): node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    needs = re.search(r"Requires (.+?)\.(?:\s|$)", doc, re.S)
    return Recipe(
        path.stem,
        path,
        given.get("config.algorithm", "sft"),
        given.get("config.model.path", ""),
        " ".join(needs[1].split()) if needs else "",
        doc.partition("\n")[0],
    )


def _table() -> list[str]:
    head = ("recipe", "algorithm", "model", "give")
    rows = [head, *((one.name, one.algorithm, one.model or "yours", one.needs) for one in recipes().values())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]


def _write(path: pathlib.Path, text: str, *, force: bool) -> None:
    if path.is_dir():
        raise UserError(f"--out={path}: found a folder, expected a file FILE.py")
    if path.exists() and not force:
        raise ExistingFileError(f"--out={path}: there is a file already; choose another name, or say --force")
    if not path.absolute().parent.is_dir():
        raise MissingFileError(f"--out={path}: found no folder {path.parent}")
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
