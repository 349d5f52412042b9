"""Settings in YAML or JSON: plain values, and the lines that they are in."""

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from jlora.errors import MissingFileError, UserError

ENDINGS = (".yaml", ".yml", ".json")

# The core schema of YAML 1.2 (yaml.org/spec/1.2.2, 10.3.2). That of YAML 1.1, which PyYAML follows, reads 1e-4 as text,
# `no` as False, 2026-11-30 as a date and 1:30 as a number.
_CORE = {
    "null": (r"null|Null|NULL|~|", ("n", "N", "~", "")),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": ("<<", "<"),
}


class _Loader(yaml.SafeLoader):
    """Reads the core schema, and refuses keys that stand twice."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's own form)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        _refuse_repeated(keys, f"{self.name}, line {node.start_mark.line + 1}")
        return node

    def construct_yaml_int(self, node: yaml.Node) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


for _name, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read(path: str) -> Any:
    """The values of a YAML or JSON file.

    Raises:
        FileNotFoundError: the file does not exist or cannot be read.
        ValueError: it is not valid, or has a key twice.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeated([key for key, _ in found], path)
        return dict(found)

    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=pairs) if path.lower().endswith(".json") else _loaded(text, path)
    except OSError as error:
        raise MissingFileError(
            f"{path} is not a file that can be read ({error.strerror}); expected settings"
        ) from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML or JSON ({error})") from error
    return values


def lines(path: str) -> dict[str, int]:
    """The line of each key of a YAML or JSON file that `read` can read, by its dotted path."""
    loader = _loader(pathlib.Path(path).read_text(encoding="utf-8"), path)
    try:
        return dict(_lines(loader.get_single_node()))
    except yaml.YAMLError:  # JSON may be indented with tabs
        return {}
    finally:
        loader.dispose()


def _lines(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            yield path + key.value, key.start_mark.line + 1
            yield from _lines(value, f"{path}{key.value}.")


def _loader(text: str, path: str) -> _Loader:
    loader = _Loader(text)
    loader.name = path
    return loader


def _loaded(text: str, path: str) -> Any:
    loader = _loader(text, path)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _refuse_repeated(keys: Sequence[str], where: str) -> None:
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"{where}: found {', '.join(repeated)} more than once, expected each setting once")


def refuse_odd_values(value: Any, where: str, around: tuple[int, ...] = ()) -> None:
    """Refuses settings whose name is not text, and values that contain themselves, as YAML's anchors allow."""
    if id(value) in around:
        raise UserError(f"{where}: found a value that contains itself (a YAML anchor), expected plain settings")
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not isinstance(key, str):
            raise UserError(f"{where}: found the key {key!r}, expected the name of a setting as text")
        refuse_odd_values(inner, f"{where}: {key}", (*around, id(value)))
