"""What `jlora data` takes."""

import argparse

from jlora.cli.parsers.options import add_config_option, command


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora data`."""
    parser = command(
        "data",
        usage="jlora data --config=RECIPE [--config.GROUP.KEY=VALUE ...] [--show=N] [--json]",
        description="What a run trains on, before anything is trained: which form the files have and what of them is "
        "not used, examples token by token with those that are trained marked, how they are packed into rows, their "
        "lengths, and what is left out and why. Only the model's tokenizer is loaded.",
    )
    add_config_option(parser)
    parser.add_argument("--show", type=int, default=3, metavar="N", help="how many examples are shown (default: 3)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser
