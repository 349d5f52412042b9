"""`jlora export`: the result of a training run as an adapter (PEFT, GGUF) or a merged model (Hugging Face, GGUF)."""

import argparse
import warnings

from jlora import hub, lora
from jlora.cli.kept import print_kept
from jlora.cli.model import (
    adapter_layout,
    refuse_layout,
    require_gguf,
    require_out,
    say_adapter,
    say_kept,
    tensor_bar,
    write_modelfile,
)
from jlora.hub import cards
from jlora.models.model import SCORE
from jlora.train.config import RunConfig
from jlora.train.restore import load_run, read_config
from jlora.train.results import run_tokenizer
from jlora.types import Params


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    run_config = read_config(options.workdir)
    full = run_config.lora is None
    options.merged = options.merged or full  # there is no adapter to write alone
    if options.merged or options.gguf:
        refuse_layout(options, "PEFT adapters; a merged model has none, and GGUF has one layout and its own scales")
    require_gguf(options, adapter=not options.merged)
    settings = run_config.model
    inputs = {"--workdir": options.workdir, "the run's base": settings.path, "its first adapter": settings.adapter}
    require_out(options, inputs)
    config, model, params = load_run(options.workdir, options.step)
    say_kept(config.model.path, params)
    if options.gguf and options.merged:
        with tensor_bar() as bar:
            hub.save_gguf(
                options.out, model, params, config.model.path, dtype=options.gguf, progress=bar, force=options.force
            )
    elif options.gguf:
        hub.save_gguf_adapter(options.out, model, params, dtype=options.gguf, force=options.force)
    elif options.merged:
        card = _card(config, params, options)
        if config.model.merges_packed:
            hub.save_quantized(
                options.out, model, lora.merge(params), tokenizer=run_tokenizer(config), card=card, force=options.force
            )
        else:
            hub.save_model(options.out, model, params, tokenizer=run_tokenizer(config), card=card, force=options.force)
    else:
        resized = config.model.resize_vocab is not None
        layout = adapter_layout(options, config.train)
        hub.save_adapter(options.out, params, base=config.model.path, save_embedding_layers=resized, **layout)
    if options.merged:
        print(f"{'' if full else 'merged '}model: {options.out}")
    else:
        say_adapter(options.out, gguf=bool(options.gguf))
    if options.modelfile:
        base = config.model.path
        write_modelfile(options, model, base, hub.load_tokenizer(base), adapter=not options.merged)
    if not options.merged:
        return 0
    if not (options.unmeasured or full):
        try:
            _, written = hub.load(options.out, dtype="float32" if options.gguf else hub.exact_dtype(options.out))
            print_kept(model, params, written, hub.load_tokenizer(config.model.path))
        except (ValueError, RuntimeError, MemoryError) as error:  # the model is written even if the figures fail
            warnings.warn(f"the share of the update kept could not be measured (--unmeasured): {error}", stacklevel=2)
    return 0


def _card(config: RunConfig, params: Params, options: argparse.Namespace) -> cards.Card:
    """The merged folder's card; `jlora publish` tells more of the run."""
    run, full = cards.shown(options.workdir), config.lora is None
    at = f", at step {options.step}" if options.step is not None else ""
    what = "All weights of the base" if full else "A LoRA adapter"
    how = f"{what} trained by the run `{run}`{at}{'' if full else ', and merged into the base'}."
    return cards.model_card(options.out, [config.model.path], how, lora=not full, scored=SCORE in params)
