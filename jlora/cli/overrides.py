"""A recipe with the command line's `--config.group.key=value` applied on top."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jlora.cli import recipes, yamlfile
from jlora.errors import UserError
from jlora.train.config import RunConfig, default_config, resolve, swept
from jlora.train.rewards.pyfile import call, load_function

_NO_GROUP = re.compile(r"--?config\.(\w+)=None")


def read_run(path: str, overrides: Sequence[str], sweeps: Sequence[str] = ()) -> RunConfig:
    """The run of the file's settings, changed by the overrides; a sweep makes it a run of several adapters.

    Raises:
        FileNotFoundError: the file does not exist or cannot be read.
        ValueError: the file, the overrides or the settings are invalid.
    """
    config = read_config(path, overrides)
    try:
        return swept(config, sweeps) if sweeps else resolve(config)
    except UserError as error:
        if not _is_settings(path):
            raise
        raise UserError(_located(str(error), path, overrides)) from error


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The ConfigDict of the file's get_config(), changed by the overrides.

    Unknown keys stay in it, so that `resolve` can name all of them at once. FILE.py:WORD passes WORD to get_config. A
    YAML or JSON file, such as the config.json of a run, holds what differs from the defaults. The path may also be the
    name of one of jlora's recipes.

    Raises:
        FileNotFoundError: the file does not exist or cannot be read.
        ValueError: the file or the overrides are invalid.
    """
    path = recipes.located(path)
    file, colon, word = path.partition(":")
    if _is_settings(path):
        return _apply(_read_settings(path), overrides) if overrides else _read_settings(path)
    config = call(file, load_function(file, "get_config"), *([word] if colon else []))
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() returned {type(config).__name__}, expected an ml_collections.ConfigDict")
    if not overrides:
        return config
    return _apply(config, overrides)


def _is_settings(path: str) -> bool:
    return path.lower().endswith(yamlfile.ENDINGS)


def _read_settings(path: str) -> ConfigDict:
    """The default settings, overridden by those of a YAML or JSON file."""
    values, config = yamlfile.read(path), default_config()
    if not isinstance(values, dict) or not set(values) & set(config):
        raise UserError(
            f"{path}: found none of jlora's settings, expected groups of them ({', '.join(config)}), as in\n"
            "  model: {path: FOLDER}\n  data: {path: FILE.jsonl}\n  train: {epochs: 1}\n"
            "(recipes of other tools have other names; jlora train --help lists all settings)"
        )
    yamlfile.refuse_odd_values(values, path)
    _merge(config, values, path)
    return config


def _located(message: str, path: str, overrides: Sequence[str]) -> str:
    """The message about settings, with the line of the YAML or JSON file that each fault comes from."""
    lines: dict[str, int | None] = dict(yamlfile.lines(path))
    for override in overrides:  # what they say is not said in the file
        lines |= dict.fromkeys(re.findall(r"^--?(?:no)?config\.([\w.]+)", override))

    def located(line: str) -> str:
        named = re.match(r"\s*([\w.-]+)", re.sub(r"\['([\w.-]+)'\](?:: )?\.?", r".\1.", line))
        words = named[1].strip(".").split(".") if named else []
        outer = [".".join(words[:count]) for count in range(len(words), 0, -1)]
        known = next((lines[name] for name in outer if name in lines), None)
        return f"{line} ({path}, line {known})" if known else line

    first, *rest = message.split("\n")
    return "\n".join([first, *map(located, rest)])


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
