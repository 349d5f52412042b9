"""What each command takes: a file with a `parser()` for each.

Nothing here imports what does a command's work, so that help and mistakes need not wait for JAX.
"""

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {
    "train": "fine-tune a model with LoRA or QLoRA",
    "recipes": "the recipes that come with jlora",
    "data": "what a run trains on, token by token",
    "plan": "memory, FLOPs and traffic of a run on devices that you need not have",
    "compare": "several runs in one table and one plot",
    "eval": "loss, perplexity and answers of a model on a JSONL file",
    "generate": "answer a prompt",
    "chat": "talk to a model in a terminal",
    "serve": "OpenAI's API, with every adapter of a folder as a model",
    "merge": "bake adapters into a model, or several into one",
    "extract": "an adapter from a model and the base it was trained from",
    "export": "a PEFT adapter or a merged model from a training run",
    "publish": "an adapter or a model as a folder for the Hub, with its card, and the upload",
    "quantize": "pack a model into 4 or 8 bits, as bitsandbytes does",
    "completion": "what makes a shell complete these commands",
}


def parser(command: str) -> argparse.ArgumentParser:
    """The parser of `jlora COMMAND`."""
    return importlib.import_module(f"jlora.cli.parsers.{command}").parser()


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `jlora COMMAND ARGUMENTS`; what is for the recipe of a run is in `overrides`, unread.

    Raises:
        SystemExit: after --help with 0, after a mistake and its message with 2.
    """
    chosen = parser(command)
    options, rest = chosen.parse_known_args(arguments)
    if hasattr(options, "overrides"):
        options.overrides = rest
    elif rest:
        chosen.error(f"unrecognized arguments: {' '.join(rest)}")
    return options
