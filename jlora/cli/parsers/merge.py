"""What `jlora merge` takes."""

import argparse

from jlora.cli.parsers.options import (
    add_dtype_option,
    add_force_option,
    add_gguf_option,
    add_layout_options,
    add_on_error_option,
    add_source_option,
    add_vocab_option,
    command,
    rank,
    suggest,
)
from jlora.names import MIXTURES, WRITTEN_FORMATS


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora merge`."""
    parser = command(
        "merge",
        "Merge an adapter, or a mixture of several, into the model, and report how much of the update is kept.",
        usage="jlora merge --model=MODEL --adapter=DIR[:WEIGHT] [--adapter=DIR[:WEIGHT] ...] --out=PATH [OPTIONS]\n"
        "       jlora merge --recipe=FILE.yaml --out=DIR [--force]",
        epilog="Sums are formed in float32 on the unpacked base and rounded once. The base itself is not changed: to "
        "unmerge, use it again.",
    )
    add_source_option(parser, required=False)
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="DIR[:WEIGHT]", help="a PEFT folder; may be repeated"
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE.yaml",
        help="combine whole models instead, tensor by tensor, as a recipe in mergekit's form says",
    )
    method = parser.add_argument("--method", help=f"for several adapters: {', '.join(MIXTURES)} (default: linear)")
    suggest(method, MIXTURES)
    parser.add_argument("--density", type=float, help="the share of values that pruning methods keep")
    parser.add_argument("--rank", type=rank, help="rank of the mixture, or the share of its energy to keep, as 0.99")
    parser.add_argument("--seed", type=int, default=0, help="seed of methods that draw at random (default: 0)")
    parser.add_argument("--adapter_only", action="store_true", help="write the mixture as an adapter")
    add_vocab_option(parser)
    add_layout_options(parser)
    add_gguf_option(parser)
    packed = parser.add_argument("--quant", metavar="FORMAT", help="pack the merged model; needs --lossy")
    suggest(packed, WRITTEN_FORMATS)
    parser.add_argument("--lossy", action="store_true", help="pack although that erases small updates")
    add_dtype_option(parser, "dtype of the folder (default: the checkpoint's; bfloat16 for blocks of GGUF)")
    parser.add_argument("--data", metavar="FILE.jsonl", help="records to compare merged and unmerged model on")
    add_on_error_option(parser)
    parser.add_argument(
        "--unmeasured",
        action="store_true",
        help="do not measure how much of the update is kept",
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder to write, or the GGUF file")
    add_force_option(parser)
    return parser
