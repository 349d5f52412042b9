"""The options that several commands take."""

import argparse
from collections.abc import Sequence
from typing import get_args

from jlora.cli.settings import settings
from jlora.names import FLOATS, GGUF_TYPES, OWN_SETTINGS, PACKED_FORMATS, ExpertLayout, OnError


def command(
    name: str, description: str, *, epilog: str | None = None, usage: str | None = None, add_help: bool = True
) -> argparse.ArgumentParser:
    """The parser of `jlora NAME`, which takes options by their full names only."""
    return argparse.ArgumentParser(
        prog=f"jlora {name}",
        usage=usage,
        description=description,
        epilog=epilog,
        add_help=add_help,
        allow_abbrev=False,
    )


def suggest(action: argparse.Action, values: Sequence[str]) -> None:
    """Has shells complete the option with these values, although others are valid too (`jlora.cli.completion`)."""
    action.completer = lambda **_: values


# Those of a run's settings of the mesh that commands take which answer with a model.
MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")


def add_config_option(parser: argparse.ArgumentParser, text: str = "as for jlora train") -> None:
    """Adds --config, and `overrides` for what changes its settings: `jlora.cli.overrides` reads both."""
    parser.add_argument("--config", required=True, metavar="RECIPE", help=text)
    parser.set_defaults(overrides=[])


def add_sweep_option(parser: argparse.ArgumentParser) -> None:
    """Adds --sweep, whose values `jlora.cli.overrides.read_run` takes."""
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="GROUP.KEY=VALUE,VALUE",
        help="one adapter for each value, trained side by side in one compiled step; several --sweep make a grid, "
        "several settings in one go together: --sweep='lora.r=8,16 lora.lora_alpha=16,32'. Settings: "
        f"{', '.join(name if '.' in name else f'{name}.*' for name in OWN_SETTINGS)}",
    )


def add_source_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --model: where the model is."""
    parser.add_argument(
        "--model", required=required, metavar="MODEL", help="a Hugging Face folder, a Hub id or a GGUF file"
    )


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Adds --adapter (repeatable with `several`), and `add_base_options`."""
    if several:
        more = 'a PEFT folder for all prompts; or repeated, one for each prompt, "" for none'
        parser.add_argument("--adapter", metavar="DIR", action="append", default=[], help=more)
    else:
        parser.add_argument("--adapter", metavar="DIR", help="a PEFT folder to put on the model")
    add_base_options(parser)


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --quant, --dtype, --vocab, --fold_system and the sizes of the mesh."""
    add_source_option(parser)
    parser.add_argument(
        "--quant",
        metavar="FORMAT",
        choices=PACKED_FORMATS,
        help=f"pack the model's linears: {', '.join(PACKED_FORMATS)} (default: as they are)",
    )
    add_dtype_option(parser, "float32, bfloat16 or float16 (default: bfloat16 on TPU and GPU, float32 on CPU)")
    add_vocab_option(parser)
    parser.add_argument(
        "--fold_system",
        action="store_true",
        help='put a system text at the beginning of the first user\'s turn, as data.system="fold" does in training',
    )
    for setting in settings("mesh"):
        if setting.name in MESH:
            text = f"{setting.sentence.removesuffix('.')} (default: {setting.default}; -1: all devices that are left)"
            parser.add_argument(f"--{setting.name}", type=int, default=int(setting.default), metavar="N", help=text)


def add_dtype_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds --dtype."""
    suggest(parser.add_argument("--dtype", help=text), FLOATS)


def add_vocab_option(parser: argparse.ArgumentParser, *, of: str = "") -> None:
    """Adds --vocab; `of` says whose, if a command works on two models."""
    parser.add_argument(
        "--vocab",
        type=_rows,
        metavar="ROWS",
        help=f"give {of}embedding and head this many rows, or with 'tokenizer' as many as the tokenizer needs; new "
        "rows are the mean of the others",
    )


def add_on_error_option(parser: argparse.ArgumentParser) -> None:
    """Adds --on_error, for every command that reads records from --data: messages about records name it."""
    parser.add_argument(
        "--on_error",
        choices=get_args(OnError),
        default="raise",
        help="what to do with records that cannot be used: skip leaves them out with a warning (default: raise)",
    )


def add_gguf_option(parser: argparse.ArgumentParser) -> None:
    """Adds --gguf, --modelfile and --system."""
    parser.add_argument(
        "--gguf",
        type=str.lower,
        choices=GGUF_TYPES,
        metavar="TYPE",
        help=f"write a GGUF file of this type for llama.cpp and Ollama: {', '.join(GGUF_TYPES)}; an adapter in one of "
        "the first three",
    )
    parser.add_argument(
        "--modelfile", action="store_true", help="write a Modelfile beside the GGUF file, for `ollama create`"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system text of the Modelfile")


def add_layout_options(parser: argparse.ArgumentParser) -> None:
    """Adds --fold and --experts: how an adapter for PEFT is written."""
    parser.add_argument(
        "--fold",
        action="store_true",
        help="write the adapter with one rank and one scale for all modules, for programs that read no others (vLLM)",
    )
    parser.add_argument(
        "--experts",
        choices=get_args(ExpertLayout),
        help="write adapters of experts as PEFT does, stacked, or each by itself, as vLLM and SGLang read them",
    )


def add_force_option(parser: argparse.ArgumentParser) -> None:
    """Adds --force: `require_out` then lets --out be what jlora did not write."""
    parser.add_argument("--force", action="store_true", help="write --out over a model or adapter of another program")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {number}, expected at least 1")
    return number


def _rows(text: str) -> int | str:
    return text if text == "tokenizer" else positive(text)


def rank(text: str) -> int | float:
    """A rank, or a share of the energy to keep, for argparse."""
    return int(text) if text.isdigit() else float(text)
