#!/usr/bin/env python3
"""How often each kind of knowledge is spelled in the package, and in how many files; lines and files of each room.

    python tests/house.py

Docstrings and comments do not count. Knowledge that has one table is spelled in one place, and what needs it asks the
table: a number that grows here is a table that is missing. `test_house.py` holds the numbers down.
"""

import ast
import collections
import io
import pathlib
import re
import sys
import tokenize
from collections.abc import Callable, Iterator

from jlora.families import FAMILIES

PACKAGE = pathlib.Path(__file__).parent.parent / "jlora"

LEAVES = (
    *("lora_a", "lora_b", "lora_bias", "lora_magnitude", "lora_tokens", "lora_token_ids", "lora_scale", "lora_rank"),
    *("lora_dropout", "lora_start_a", "lora_start_b", "lora_base_norm", "lora_tied", "lora_carried", "lora_ids"),
    "lora_weights",
)
MODEL_TYPES = tuple(FAMILIES)
ALGORITHMS = ("sft", "dft", "dpo", "cpo", "orpo", "kto", "reward", "grpo", "ppo")


def pattern(expression: str) -> Callable[[str], int]:
    """Counts the matches of a regular expression in a file's code."""
    return lambda code: len(re.findall(expression, code))


def quoted(names: tuple[str, ...]) -> Callable[[str], int]:
    """Counts the strings that are one of the names."""
    return pattern(rf"""(?<![\w/])(["'])(?:{"|".join(map(re.escape, names))})\1""")


def kinds_asked(code: str) -> int:
    """Counts the `isinstance` checks of packed kinds."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and len(node.args) == 2]
    asked = [ast.unparse(call.args[1]) for call in calls if ast.unparse(call.func) == "isinstance"]
    return sum(bool(re.search(r"\b(Packed\w*|Rounded)\b", kind)) for kind in asked)


KNOWLEDGE: dict[str, Callable[[str], int]] = {
    "names of adapter leaves": pattern(rf"""(?<=["'/])(?:{"|".join(LEAVES)}|trained_)(?![a-z])"""),
    "tied embedding and head": pattern(r"\bTIED_HEADS\b|\btie\("),
    "names of model types": quoted(MODEL_TYPES),
    "isinstance of packed kinds": kinds_asked,
    "is_packed": pattern(r"\bis_packed\b"),
    "names of algorithms": quoted(ALGORITHMS),
    "PEFT's matching rules": pattern(r"\.(?:exclude_modules|layers_to_transform|rank_pattern|alpha_pattern)\b"),
    "paths cut by hand": pattern(r"""partition\((["'])/\1\)"""),
}


def count(root: pathlib.Path = PACKAGE) -> dict[str, tuple[int, int]]:
    """Kind of knowledge → (how often it is spelled below `root`, in how many files)."""
    found: dict[str, list[int]] = {name: [] for name in KNOWLEDGE}
    for path in sorted(root.rglob("*.py")):
        code = spoken(path.read_text())
        for name, counted in KNOWLEDGE.items():
            found[name].append(counted(code))
    return {name: (sum(counts), sum(map(bool, counts))) for name, counts in found.items()}


def rooms(root: pathlib.Path = PACKAGE) -> dict[str, tuple[int, int]]:
    """Folder → (its Python files, their lines), folders below it not included."""
    sizes: dict[str, list[int]] = collections.defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        sizes[str(path.parent.relative_to(root.parent))].append(len(path.read_text().splitlines()))
    return {name: (len(lines), sum(lines)) for name, lines in sorted(sizes.items())}


def spoken(source: str) -> str:
    """The code without its comments and docstrings."""
    lines = source.splitlines(keepends=True)
    for (first, start), (last, end), instead in sorted(_silent(source), reverse=True):
        lines[first - 1 : last] = [lines[first - 1][:start] + instead + lines[last - 1][end:]]
    return "".join(lines)


def _silent(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int], str]]:
    """Where comments and docstrings start and end, and what keeps the code valid in their place."""
    documented = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING and token.start[0] in documented:
            yield token.start, token.end, '""'
        if token.type == tokenize.COMMENT:
            yield token.start, token.end, ""


def _table(header: tuple[str, str, str], rows: dict[str, tuple[int, int]]) -> Iterator[str]:
    width = max(map(len, (header[0], *rows)))
    yield f"{header[0]:<{width}}  {header[1]:>8}  {header[2]:>8}"
    for name, (first, second) in rows.items():
        yield f"{name:<{width}}  {first:>8,}  {second:>8,}"


def main() -> None:
    """Prints both tables."""
    sizes = rooms()
    total = tuple(map(sum, zip(*sizes.values(), strict=True)))
    print(*_table(("knowledge", "spelled", "in files"), count()), sep="\n", end="\n\n")
    print(*_table(("room", "files", "lines"), sizes | {"all": total}), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
