"""What `jlora recipes` takes."""

import argparse

from jlora.cli.parsers.options import command


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora recipes`."""
    parser = command(
        "recipes",
        "List the recipes that come with jlora, each with its algorithm, its model and what to give; or show one.",
        epilog="`jlora train --config=NAME --config.GROUP.KEY=VALUE` runs one; NAME:WORD passes a word to it, as in "
        "grpo:dr_grpo.",
    )
    parser.add_argument("name", nargs="?", metavar="RECIPE", help="the recipe to print")
    parser.add_argument("--out", metavar="FILE.py", help="write a copy of it, to change")
    parser.add_argument("--force", action="store_true", help="write --out over a file that is there")
    return parser
