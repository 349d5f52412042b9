"""What `jlora export` takes."""

import argparse

from jlora.cli.parsers.options import add_force_option, add_gguf_option, add_layout_options, command


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora export`."""
    parser = command(
        "export",
        "Write the adapter of a training run, or its model with the adapter merged in.",
        epilog="The merged model has the weights that the adapter was trained on: a quantised base is unpacked; "
        "base and adapter of a merge_aware run are packed together, as they were trained. A run of full fine-tuning "
        "has no adapter: it is always a whole model.",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the workdir of `jlora train`")
    parser.add_argument(
        "--step", type=int, metavar="N", help="a saved step (default: the best if the run looks for it, or the newest)"
    )
    parser.add_argument("--merged", action="store_true", help="a whole model that transformers opens, not an adapter")
    parser.add_argument(
        "--unmeasured",
        action="store_true",
        help="do not measure how much of the update --merged kept (saves the memory of a second model)",
    )
    add_gguf_option(parser)
    add_layout_options(parser)
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder to write, or the GGUF file")
    add_force_option(parser)
    return parser
