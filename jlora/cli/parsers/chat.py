"""What `jlora chat` takes."""

import argparse
import dataclasses

from jlora.cli.parsers.options import add_base_options, command, positive

BASE = "none"  # the adapter's name that stands for the base alone
HELP = f"""/adapter NAME      answer with this adapter; {BASE} for the base alone; without a name: which there are
/system TEXT       what the model is told before the conversation; without a text: nothing
/set NAME=VALUE …  change settings; without any: show them
/undo              take back what was said last, and its answer
/reset             start over
/help              this
/quit              or Ctrl-D
Ctrl-C ends an answer; a line that ends with a backslash goes on in the next."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn; `seed` is None for another one each time."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = 1024
    seed: int | None = None

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora chat`."""
    parser = command("chat", "Talk to the model; /help inside tells what else can be said.", epilog=HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_base_options(parser)
    parser.add_argument(
        "--adapter", metavar="DIR", action="append", default=[], help="a PEFT folder; may be repeated, to switch"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument(
        "--length", type=positive, help="the most tokens of a conversation (default: the model's, up to 8192)"
    )
    for field in dataclasses.fields(Settings):
        default = "another one for each answer" if field.default is None else field.default
        parser.add_argument(f"--{field.name}", metavar="N", help=f"default: {default}")
    return parser
