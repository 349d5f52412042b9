"""What `jlora quantize` takes."""

import argparse

from jlora.cli.parsers.options import (
    add_dtype_option,
    add_force_option,
    add_on_error_option,
    add_source_option,
    add_vocab_option,
    command,
    suggest,
)
from jlora.names import WRITTEN_FORMATS


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora quantize`."""
    parser = command(
        "quantize",
        "Pack the linears of every layer (mxfp4: gpt-oss's experts); embeddings, head and norms stay as they are.",
        epilog="The folder opens in transformers with bitsandbytes and in jlora, with the same values.",
    )
    add_source_option(parser)
    packed = parser.add_argument(
        "--quant", default="nf4", metavar="FORMAT", help=f"{', '.join(WRITTEN_FORMATS)} (default: nf4)"
    )
    suggest(packed, WRITTEN_FORMATS)
    parser.add_argument(
        "--no-double-quant", action="store_true", help="4 bits: block scales in float32 (4.5 bits a weight, not 4.13)"
    )
    parser.add_argument(
        "--bits", type=float, metavar="BITS", help="mean bits a weight of the linears; the most sensitive keep 16"
    )
    parser.add_argument(
        "--data", metavar="FILE.jsonl", help="records on which --bits measures that (default: by the weights' error)"
    )
    add_on_error_option(parser)
    add_dtype_option(parser, "dtype of what is not packed (default: the checkpoint's; bfloat16 for GGUF's blocks)")
    add_vocab_option(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    add_force_option(parser)
    return parser
