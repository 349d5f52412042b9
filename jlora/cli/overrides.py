"""A recipe with the command line's `--config.group.key=value` applied on top."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jlora.errors import MissingFileError, UserError
from jlora.train.config import RunConfig, default_config, resolve, swept
from jlora.train.rewards.pyfile import call, load_function

_SETTINGS = (".yaml", ".yml", ".json")
_NO_GROUP = re.compile(r"--?config\.(\w+)=None")
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def read_run(path: str, overrides: Sequence[str], sweeps: Sequence[str] = ()) -> RunConfig:
    """The run of the file's settings, changed by the overrides; a sweep makes it a run of several adapters.

    Raises:
        FileNotFoundError: the file does not exist or cannot be read.
        ValueError: the file, the overrides or the settings are invalid.
    """
    config = read_config(path, overrides)
    return swept(config, sweeps) if sweeps else resolve(config)


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The ConfigDict of the file's get_config(), changed by the overrides.

    Unknown keys stay in it, so that `resolve` can name all of them at once. FILE.py:WORD passes WORD to get_config. A
    YAML or JSON file, such as the config.json of a run, holds what differs from the defaults.

    Raises:
        FileNotFoundError: the file does not exist or cannot be read.
        ValueError: the file or the overrides are invalid.
    """
    file, colon, word = path.partition(":")
    if pathlib.Path(file).suffix.lower() in _SETTINGS:
        return _apply(_read_settings(path), overrides) if overrides else _read_settings(path)
    config = call(file, load_function(file, "get_config"), *([word] if colon else []))
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() returned {type(config).__name__}, expected an ml_collections.ConfigDict")
    if not overrides:
        return config
    return _apply(config, overrides)


def _read_settings(path: str) -> ConfigDict:
    """The default settings, overridden by those of a YAML or JSON file."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads YAML 1.2's numbers (in YAML 1.1, which PyYAML follows, 1e-4 is text) and refuses repeated keys."""

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            _refuse_repeated(keys, f"{path}, line {node.start_mark.line + 1}")
            return node

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeated([key for key, _ in found], path)
        return dict(found)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        values = (
            json.loads(text, object_pairs_hook=pairs) if path.lower().endswith(".json") else yaml.load(text, Loader)
        )
    except OSError as error:
        raise MissingFileError(
            f"{path} is not a file that can be read ({error.strerror}); expected settings"
        ) from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML or JSON ({error})") from error
    config = default_config()
    if not isinstance(values, dict) or not set(values) & set(config):
        raise UserError(
            f"{path}: found none of jlora's settings, expected groups of them ({', '.join(config)}), as in\n"
            "  model: {path: FOLDER}\n  data: {path: FILE.jsonl}\n  train: {epochs: 1}\n"
            "(recipes of other tools have other names; jlora train --help lists all settings)"
        )
    _refuse_odd_values(values, path)
    _merge(config, values, path)
    return config


def _refuse_repeated(keys: Sequence[str], where: str) -> None:
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"{where}: found {', '.join(repeated)} more than once, expected each setting once")


def _refuse_odd_values(value: Any, where: str, around: tuple[int, ...] = ()) -> None:
    """Refuses settings whose name is not text, and values that contain themselves, as YAML's anchors allow."""
    if id(value) in around:
        raise UserError(f"{where}: found a value that contains itself (a YAML anchor), expected plain settings")
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not isinstance(key, str):
            raise UserError(f"{where}: found the key {key!r}, expected the name of a setting as text")
        _refuse_odd_values(inner, f"{where}: {key}", (*around, id(value)))


def _merge(config: ConfigDict, values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(config.get(key), ConfigDict):
            _merge(config[key], value, f"{where}: {key}")
            continue
        try:
            config[key] = value
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: {key}: {error}") from error


def _apply(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    # absl parses a group as a dict only. Without a group, settings of it that other overrides give have no effect.
    without = {argument: found[1] for argument in overrides if (found := _NO_GROUP.fullmatch(argument))}
    without = {argument: name for argument, name in without.items() if isinstance(config.get(name), ConfigDict)}
    overrides = [argument for argument in overrides if argument not in without]
    for argument in overrides:
        path = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if path and "." in path[1] and path[1].split(".")[0] not in config:
            with config.unlocked():
                config[path[1].split(".")[0]] = ConfigDict()
    # A separate FlagValues leaves the process's flags as they are.
    values = flags.FlagValues()
    argv = ["jlora", *overrides]
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, lock_config=False, accept_new_attributes=True, sys_argv=argv
        )
        unused = values(argv)[1:]
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(_explain(error)) from error
    if unused:
        raise UserError(f"unexpected {' '.join(unused)!r}; settings are given as --config.GROUP.KEY=VALUE")
    for name in without.values():
        holder.value[name] = None
    return holder.value


def _explain(error: Exception) -> str:
    message = str(error.args[0]) if error.args else str(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"unknown option --{error.flagname}; settings are given as --config.GROUP.KEY=VALUE"
    return message.removeprefix("flag ")
