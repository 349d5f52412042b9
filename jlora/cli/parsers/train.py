"""What `jlora train` takes."""

import argparse
from typing import Any

from jlora.cli.parsers.common import add_config_option, add_sweep_option, command


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from jlora.cli.settings import described  # this needs the settings' classes, and thus JAX

        print(f"{parser.format_help()}\n{described()}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora train`."""
    parser = command(
        "train",
        usage="jlora train --config=FILE.py [--config.GROUP.KEY=VALUE ...] [--sweep=GROUP.KEY=VALUE,VALUE ...] "
        "[--workdir=DIR]",
        description="Fine-tune a model. Run the same command again to resume after an interruption.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help message and exit")
    add_config_option(parser, "a file with get_config() (see configs/), or YAML or JSON")
    parser.add_argument(
        "--workdir", metavar="DIR", help="checkpoints, metrics and adapter (default: runs/<name of FILE>)"
    )
    add_sweep_option(parser)
    parser.add_argument(
        "--profile",
        metavar="N",
        help="trace N steps into the workdir's profile/ (train.profile), for xprof, TensorBoard",
    )
    parser.add_argument("--distributed", action="store_true", help="several hosts: call jax.distributed.initialize()")
    return parser
