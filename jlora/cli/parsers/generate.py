"""What `jlora generate` takes."""

import argparse

from jlora.cli.parsers.options import add_model_options, command, positive


def _temperature(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"found {number}, expected 0 (the likeliest token) or more")
    return number


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora generate`."""
    parser = command("generate", "Print the model's answer to each prompt.")
    add_model_options(parser, several=True)
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--max_new_tokens", type=positive, default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="default: 0, always the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    return parser
