"""The settings of a run, read from the source of their classes: to import those takes JAX, and thus seconds.

The classes' annotations are the types, and the `Attributes:` of their docstrings the sentences, so that a setting is
described in one place. `tests/cli/test_settings.py` compares what is read here with the classes themselves.
"""

import ast
import functools
import inspect
import pathlib
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
RUN = ("jlora.train.config.run", "RunConfig")  # its own settings are in no group
SHARED = ("jlora.train.settings", "SharedConfig")
ALGORITHMS = ("jlora.train.algorithms", "ALGORITHMS")


class Setting(NamedTuple):
    """A setting.

    Attributes:
        name: with its group, as in "lora.r".
        type: in words, as in "int or None".
        default: as Python writes it; None: required.
        choices: all values that the type allows, as the command line takes them; () if they cannot be listed.
        sentence: what it decides.
    """

    name: str
    type: str
    default: str | None
    choices: tuple[str, ...]
    sentence: str


class Group(NamedTuple):
    """Settings that belong together; `name` is "" for those without a group, `optional` whether it may be None."""

    name: str
    sentence: str
    settings: tuple[Setting, ...]
    optional: bool = False


class Found(NamedTuple):
    """A class or a value in the source, and the module that it is in, whose names it uses."""

    module: str
    node: ast.AST


@functools.cache
def groups() -> tuple[Group, ...]:
    """Every group of settings, in the order of a run's config.json."""
    run, shared = _find(*RUN), _find(*SHARED)
    own = Group("", "", tuple(_settings(run, "")))
    fields = {field.target.id: field for field in _fields(shared.node)}
    found = [
        _group(name, group, optional=_is_optional(field.annotation))
        for name, field in fields.items()
        if (group := _class_of(shared.module, field))
    ]
    return (own, *found, *(_group(name, group) for name, group in _algorithms_groups().items()))


def settings(within: str = "") -> list[Setting]:
    """Every setting, or those within a group or of a name."""
    found = [setting for group in groups() for setting in group.settings]
    return [one for one in found if not within or one.name == within or one.name.startswith(f"{within}.")]


def described(within: str = "", *, width: int = 120) -> str:
    """What help says of the settings within a group, or of all of them."""
    chosen = {setting.name for setting in settings(within)}
    return "\n".join(line for group in groups() for line in _lines(group, chosen, width))


def _lines(group: Group, chosen: set[str], width: int) -> Iterator[str]:
    shown = [setting for setting in group.settings if setting.name in chosen]
    if shown and group.name:
        none = f" --config.{group.name}=None: without." if group.optional else ""
        yield from textwrap.wrap(f"{group.name}: {group.sentence}{none}", width, subsequent_indent="  ")
        yield ""
    for setting in shown:
        default = "required" if setting.default is None else f"default {setting.default}"
        head = f"  --config.{setting.name}  {setting.type}; {default}"
        yield from textwrap.wrap(head, width, subsequent_indent=" " * 10, break_on_hyphens=False)
        yield from textwrap.wrap(setting.sentence, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        yield ""


@functools.cache
def _names(module: str) -> dict[str, ast.AST | tuple[str, str]]:
    """What the source of a module defines: classes and values, and for what it imports (module, name)."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: dict[str, ast.AST | tuple[str, str]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef(name=name):
                found[name] = node
            case ast.Assign(targets=[ast.Name(id=name)], value=value) | ast.AnnAssign(ast.Name(id=name), value=value):
                found[name] = value
            case ast.ImportFrom(module=str(home), names=aliases) if home.startswith("jlora"):
                found |= {alias.asname or alias.name: (home, alias.name) for alias in aliases}
    return found


def _find(module: str, name: str) -> Found | None:
    """Where the name that a module uses is defined; None if that is outside of jlora."""
    found = _names(module).get(name)
    return _find(*found) if isinstance(found, tuple) else found and Found(module, found)


def _class(module: str, node: ast.AST | None) -> Found | None:
    """The class of jlora that an expression names."""
    found = _find(module, node.id) if isinstance(node, ast.Name) else None
    return found if found and isinstance(found.node, ast.ClassDef) else None


def _class_of(module: str, field: ast.AnnAssign) -> Found | None:
    """The class of a field that is a group: its type, or that of its default."""
    made = field.value.func if isinstance(field.value, ast.Call) else None
    return _class(module, field.annotation) or _class(module, made)


def _algorithms_groups() -> dict[str, Found]:
    """The groups that algorithms add, by name: in an algorithm's row, the dict whose values are classes."""
    home, table = _find(*ALGORITHMS)
    rows = [_find(home, value.id) for value in table.values]
    found = {}
    for module, row in rows:
        for node in ast.walk(row):
            if isinstance(node, ast.Dict):
                pairs = {key.value: _class(module, value) for key, value in zip(node.keys, node.values, strict=True)}
                found |= {name: group for name, group in pairs.items() if group}
    return found


def _fields(group: ast.ClassDef) -> list[ast.AnnAssign]:
    return [node for node in group.body if isinstance(node, ast.AnnAssign)]


def _group(name: str, found: Found, *, optional: bool = False) -> Group:
    doc = inspect.cleandoc(ast.get_docstring(found.node) or "")
    return Group(name, " ".join(doc.partition("\n\n")[0].split()), tuple(_settings(found, f"{name}.")), optional)


def _settings(found: Found, path: str) -> Iterator[Setting]:
    module, group = found
    sentences = _sentences(ast.get_docstring(group) or "")
    for field in _fields(group):
        name = field.target.id
        yield Setting(
            path + name,
            _type(module, field.annotation),
            _default(module, field.value),
            tuple(_choices(module, field.annotation)),
            sentences.get(name, ""),
        )


def _sentences(docstring: str) -> dict[str, str]:
    """What the docstring's Attributes: say of each name."""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", docstring, re.M)
    found = {}
    for entry in re.split(r"\n(?=    \S)", section[1] if section else ""):
        names, _, text = entry.partition(":")
        found |= dict.fromkeys(names.replace(" ", "").split(","), " ".join(text.split()))
    return found


def _type(module: str, node: ast.AST) -> str:
    """An annotation in the words of `jlora.train.config.typed.describe`."""
    if isinstance(node, ast.BinOp):
        return f"{_type(module, node.left)} or {_type(module, node.right)}"
    if values := _literal(module, node):
        return f"one of {', '.join(map(repr, values))}"
    if group := _class(module, node):
        return f"a group with the keys {', '.join(field.target.id for field in _fields(group.node))}"
    found = _find(module, node.id) if isinstance(node, ast.Name) else None
    return _type(*found) if found else ast.unparse(node)


def _literal(module: str, node: ast.AST) -> list[str]:
    """The values of a Literal[…]; [] for other annotations."""
    match node:
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Call(args=[ast.Name(id=table)])):
            return [key.value for key in _find(module, table).node.keys]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=values)):
            return [value.value for value in values]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Constant(value=value)):
            return [value]
    return []


def _choices(module: str, node: ast.AST) -> list[str]:
    """All values that an annotation allows, as text; [] if they cannot be listed."""
    if isinstance(node, ast.BinOp):
        sides = [_choices(module, side) for side in (node.left, node.right)]
        return sides[0] + sides[1] if all(sides) else []
    if isinstance(node, ast.Constant) and node.value is None:
        return ["None"]
    if isinstance(node, ast.Name):
        found = _find(module, node.id)
        return ["true", "false"] if node.id == "bool" else _choices(*found) if found else []
    return _literal(module, node)


def _is_optional(node: ast.AST) -> bool:
    return ast.unparse(node).endswith("| None")


def _default(module: str, node: ast.AST | None) -> str | None:
    match node:
        case None:
            return None
        case ast.Call(keywords=[ast.keyword(arg="default_factory", value=ast.Name(id="dict"))]):
            return "{}"
        case ast.Name(id=name) if found := _find(module, name):
            return _default(*found)
    return repr(ast.literal_eval(node))
