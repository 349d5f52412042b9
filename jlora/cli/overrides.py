"""A recipe with the command line's `--config.group.key=value` on top."""

import re
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from jlora.errors import UserError
from jlora.train.pyfile import call, load_function


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """The ConfigDict of the file's get_config(), changed by the overrides.

    Unknown keys stay in it, so that `resolve` names all of them at once. FILE.py:WORD hands WORD to get_config.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the file or the overrides.
    """
    file, colon, word = path.partition(":")
    config = call(file, load_function(file, "get_config"), *([word] if colon else []))
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() returned {type(config).__name__}, expected a ml_collections.ConfigDict")
    if not overrides:
        return config
    return _apply(config, overrides)


def _apply(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    for argument in overrides:
        path = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if path and "." in path[1] and path[1].split(".")[0] not in config:
            with config.unlocked():
                config[path[1].split(".")[0]] = ConfigDict()
    # Flags of its own: those of the process stay what they are.
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
    return holder.value


def _explain(error: Exception) -> str:
    message = str(error.args[0]) if error.args else str(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"unknown option --{error.flagname}; settings are given as --config.GROUP.KEY=VALUE"
    return message.removeprefix("flag ")
