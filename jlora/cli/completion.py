"""`jlora completion`: what a shell runs to complete `jlora` commands, and the completions that it then asks for."""

import argparse
import os
import re
from collections.abc import Iterable

from jlora.cli.parsers import COMMANDS, parser
from jlora.cli.recipes import recipes
from jlora.cli.settings import settings
from jlora.types import require

# How the names of values begin that are files.
FILES = ("FILE", "DIR", "PATH", "MODEL", "RUN", "TUNED")
RECIPES = ("py", "yaml", "yml", "json")


def run(options: argparse.Namespace) -> int:
    """Prints the shell's code and returns 0; a package that is not installed raises."""
    argcomplete = require("argcomplete", "completion")
    print(argcomplete.shellcode(["jlora"], shell=options.shell), end="")
    return 0


def complete() -> None:
    """Writes the completions of the command line that the shell's code put into the environment; ends the process."""
    argcomplete = require("argcomplete", "completion")
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    # There are too many settings to be offered unless one is begun.
    hidden = () if re.search(r"\s--?c\S*$", line) else [f"--config.{setting.name}" for setting in settings()]
    argcomplete.autocomplete(_all_commands(), always_complete_options="long", exclude=hidden, default_completer=_values)


def _all_commands() -> argparse.ArgumentParser:
    """One parser with every command as a sub-command."""
    whole = argparse.ArgumentParser(prog="jlora", allow_abbrev=False)
    whole.add_argument("--traceback", action="store_true", help="show where in the code a mistake was noticed")
    whole.add_argument("--version", action="store_true", help="show the version")
    commands = whole.add_subparsers()
    for name, what in COMMANDS.items():
        chosen = commands.add_parser(name, help=what, parents=[parser(name)], add_help=False, allow_abbrev=False)
        if chosen.get_default("overrides") is not None:
            _add_settings(chosen)
    return whole


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for setting in settings():
        parser.add_argument(
            f"--config.{setting.name}",
            choices=setting.choices or None,
            metavar="FILE" if "str" in setting.type else "VALUE",
            help=setting.sentence.replace("%", "%%"),
        )


def _values(*, prefix: str, action: argparse.Action, **_: object) -> Iterable[str]:
    """Recipes where a value is one, and files that begin with the prefix where it is a file."""
    files = require("argcomplete.completers", "completion").FilesCompleter
    if action.metavar == "RECIPE":
        return [*recipes(), *(files(RECIPES)(prefix=prefix) if action.option_strings else ())]
    return files()(prefix=prefix) if str(action.metavar).startswith(FILES) else ()
