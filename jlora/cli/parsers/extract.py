"""What `jlora extract` takes."""

import argparse

from jlora.cli.parsers.options import add_force_option, add_layout_options, add_vocab_option, command, rank


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora extract`."""
    parser = command("extract", "Turn what full fine-tuning changed into a LoRA adapter, and report how much it keeps.")
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model before training")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the model after training")
    parser.add_argument(
        "--rank", type=rank, default=16, help="rank, or share of every change's energy to keep, as 0.9 (default: 16)"
    )
    parser.add_argument(
        "--target_modules", nargs="+", metavar="NAME", help="modules that get factors (default: all linears)"
    )
    parser.add_argument(
        "--modules_to_save", nargs="+", metavar="NAME", help="modules that the adapter holds as whole copies, as norm"
    )
    add_vocab_option(parser, of="the base's ")
    add_layout_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    add_force_option(parser)
    return parser
