"""`jlora extract`: an adapter from a model and the base that it was trained from."""

import argparse

from jlora import hub, lora
from jlora.cli.model import (
    adapter_layout,
    add_force_option,
    add_layout_options,
    add_vocab_option,
    command,
    open_model,
    rank,
    require_out,
    say_adapter,
)


def run(arguments: list[str]) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    options = _parser().parse_args(arguments)
    require_out(options, {"--base": options.base, "--model": options.model})
    model, base = open_model(options.base, dtype=hub.exact_dtype(options.base), vocab=options.vocab)
    tuned_model, tuned = open_model(options.model, dtype=hub.exact_dtype(options.model))
    # An adapter holds only weights: settings that differ would be lost.
    model.config.require_same(tuned_model.config, options.base, options.model)
    params, report = lora.extract(
        base,
        tuned,
        rank=options.rank,
        target_modules=options.target_modules or "all-linear",
        modules_to_save=options.modules_to_save,
    )
    print(report)
    resized, layout = options.vocab is not None, adapter_layout(options)
    hub.save_adapter(options.out, params, base=options.base, save_embedding_layers=resized, **layout)
    say_adapter(options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command("extract", "Turn what full fine-tuning changed into a LoRA adapter, and report how much it keeps.")
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model before training")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the model after training")
    parser.add_argument(
        "--rank", type=rank, default=16, help="rank, or share of every change's energy to keep, as 0.9 (default: 16)"
    )
    parser.add_argument(
        "--target_modules", nargs="+", metavar="NAME", help="modules that get factors (default: all linears)"
    )
    parser.add_argument(
        "--modules_to_save", nargs="+", metavar="NAME", help="modules that the adapter holds as whole copies, as norm"
    )
    add_vocab_option(parser, of="the base's ")
    add_layout_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    add_force_option(parser)
    return parser
