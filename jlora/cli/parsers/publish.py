"""What `jlora publish` takes."""

import argparse

from jlora.cli.parsers.options import command


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora publish`."""
    parser = command(
        "publish",
        "Write an adapter or a model as a folder for the Hugging Face Hub, with a card made of its run, and upload it.",
        epilog="The folder has the weights, their settings, the tokenizer if there is one, the card and the run's "
        "curves: no checkpoints, no data, and no place on this machine. Look at it, change the card if you like, and "
        "upload it with --out=DIR --repo=OWNER/NAME alone.",
    )
    parser.add_argument("--adapter", metavar="DIR", help="the folder of a PEFT adapter, or the workdir of a run")
    parser.add_argument("--model", metavar="DIR", help="the folder of a model")
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="the run that the card tells of (default: the one whose workdir the folder is in)",
    )
    parser.add_argument("--base", metavar="OWNER/NAME", help="the base on the Hub, if it was trained from a local copy")
    parser.add_argument("--license", metavar="ID", help="the licence, as apache-2.0 (default: the base's, if known)")
    parser.add_argument("--out", metavar="DIR", help="the folder to write, or with --repo alone the one to upload")
    parser.add_argument("--force", action="store_true", help="write --out over what jlora did not write")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="the repository to upload to, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--revision", metavar="NAME", help="the branch to upload to, made if it is not there")
    return parser
