"""`jlora extract`: an adapter from a model and the base that it was trained from."""

import argparse

from jlora import hub, lora
from jlora.cli.model import adapter_layout, open_model, require_out, say_adapter


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
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
