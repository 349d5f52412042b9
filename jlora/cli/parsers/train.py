"""What `jlora train` takes."""

import argparse
import difflib
import shutil
from typing import Any

from jlora.cli import settings
from jlora.cli.parsers.options import add_config_option, add_sweep_option, command


class _Help(argparse.Action):
    """Prints the options and all settings, or the settings of one group alone."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        width = min(120, shutil.get_terminal_size((120, 24)).columns)
        if values is None:
            print(f"{parser.format_help()}\nsettings, by group:\n\n{settings.described(width=width)}")
        elif text := settings.described(values.removeprefix("config."), width=width):
            print(text)
        else:
            known = [group.name for group in settings.groups() if group.name]
            near = difflib.get_close_matches(values, [*known, *(setting.name for setting in settings.settings())], n=1)
            hint = f"did you mean {near[0]}?" if near else f"the groups are {', '.join(known)}"
            parser.error(f"{option}: {values!r} is neither a group of settings nor a setting; {hint}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora train`."""
    parser = command(
        "train",
        usage="jlora train --config=RECIPE [--config.GROUP.KEY=VALUE ...] [--sweep=GROUP.KEY=VALUE,VALUE ...] "
        "[--workdir=DIR]",
        description="Fine-tune a model. Run the same command again to resume after an interruption.",
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action=_Help, nargs="?", metavar="GROUP", help="show this, or the settings of one group"
    )
    add_config_option(parser, "a name (see jlora recipes), a Python file with get_config(), or YAML or JSON")
    parser.add_argument(
        "--workdir", metavar="DIR", help="checkpoints, metrics and adapter (default: runs/<name of RECIPE>)"
    )
    add_sweep_option(parser)
    parser.add_argument(
        "--profile",
        metavar="N",
        help="trace N steps into the workdir's profile/ (train.profile), for xprof, TensorBoard",
    )
    parser.add_argument("--distributed", action="store_true", help="several hosts: call jax.distributed.initialize()")
    return parser
