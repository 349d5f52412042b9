"""What `jlora eval` takes."""

import argparse

from jlora.cli.parsers.options import add_model_options, add_on_error_option, command, positive


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora eval`."""
    parser = command(
        "eval", "Loss and perplexity on the completions of a JSONL file, and the texts that the model generates."
    )
    add_model_options(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="records as for training")
    add_on_error_option(parser)
    parser.add_argument(
        "--metric",
        metavar="FILE.py[:FUNCTION]",
        help="a file with metric(record, text) → numbers by name, or a function as train.metrics takes them",
    )
    parser.add_argument("--max_new_tokens", type=positive, default=128, metavar="N", help="longest text (default: 128)")
    parser.add_argument("--batch_size", type=positive, default=8, metavar="N", help="records per batch (default: 8)")
    parser.add_argument(
        "--seq_len", type=positive, default=512, metavar="N", help="tokens of a record to read (default: 512)"
    )
    parser.add_argument("--loss_only", action="store_true", help="do not generate texts")
    parser.add_argument("--answers", metavar="FILE.jsonl", help="write prompts, targets and texts to this file")
    parser.add_argument("--pairs", action="store_true", help="accuracy of a reward model on prompt, chosen, rejected")
    parser.add_argument(
        "--against",
        metavar="base|MODEL",
        help="compare with the model without its adapter, or with another, on --data, general text and questions",
    )
    parser.add_argument(
        "--scales", metavar="X", type=float, nargs="+", help="the same with the adapter's update scaled by each X"
    )
    parser.add_argument("--general", metavar="FILE.jsonl", help="general texts as records (default: 16 of jlora's own)")
    parser.add_argument(
        "--questions",
        metavar="FILE.jsonl",
        help="objects with question, choices and answer, the right choice's number (default: 48 of jlora's own)",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw a reward model's calibration (--pairs), or the --scales"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    return parser
