"""What `jlora serve` takes."""

import argparse

from jlora.cli.parsers.options import add_base_options, command, positive

KEY = "JLORA_API_KEY"


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"found {number}, expected 0 to 65535")
    return number


def _megabytes(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1024:
        raise argparse.ArgumentTypeError(f"found {number}, expected more than 0, at most 1024")
    return number


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora serve`."""
    parser = command("serve", "Answer requests to OpenAI's API, with every adapter of a folder as a model.")
    add_base_options(parser)
    parser.add_argument("--name", help="the base's name as a model (default: the last part of --model, without .gguf)")
    parser.add_argument(
        "--adapters", metavar="DIR", help="a folder: each PEFT folder in it is a model, as it comes, changes and goes"
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, help="default: 8000; 0: any that is free")
    parser.add_argument(
        "--api_key",
        action="append",
        metavar="KEY",
        help=f"a key that requests must have; may be repeated (default: that of the variable {KEY}, if it is set)",
    )
    parser.add_argument("--rows", type=positive, default=16, help="requests that run at a time (default: 16)")
    parser.add_argument("--queue", type=int, default=256, help="requests that may wait (default: 256)")
    parser.add_argument(
        "--length", type=positive, help="the most tokens of a prompt with its answer (default: the model's, up to 8192)"
    )
    parser.add_argument(
        "--chunk", type=positive, default=128, help="the most tokens of a prompt between two steps (default: 128)"
    )
    parser.add_argument("--body_mib", type=_megabytes, default=4.0, help="the largest request (default: 4)")
    parser.add_argument("--places", type=positive, help="adapters to make room for (default: 32)")
    parser.add_argument(
        "--rank", type=positive, help="the rank to make room for (default: that of the adapters that are there, or 16)"
    )
    parser.add_argument(
        "--modules", metavar="NAMES", help="the linears to make room at (default: those of the adapters, or all)"
    )
    parser.add_argument(
        "--adapters_dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the adapters in memory (default: float32); bfloat16 halves it, and is slow on a CPU",
    )
    parser.add_argument(
        "--drain", type=positive, default=60, metavar="SECONDS", help="for answers after SIGTERM (default: 60)"
    )
    return parser
