"""What `jlora compare` takes."""

import argparse

from jlora.cli.parsers.options import command

PLOT = "compare.png"


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora compare`."""
    parser = command(
        "compare", "Several runs in one table and one plot: the settings that differ, and what came of them."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs; of a run of several adapters, each is a run")
    parser.add_argument("--out", metavar="FILE.png", help=f"the plot (default: {PLOT}; with --json: none)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
