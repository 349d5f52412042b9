"""`jlora merge`: bakes adapters into their base, or combines several into one."""

import argparse
from typing import Any

import jax.numpy as jnp

from jlora import hub, lora, quant, tree
from jlora.cli.kept import print_kept
from jlora.cli.model import (
    adapter_layout,
    encodable,
    open_model,
    read_records,
    refuse_layout,
    require_gguf,
    require_out,
    say_adapter,
    tensor_bar,
    write_modelfile,
)
from jlora.cli.parsers.merge import parser
from jlora.errors import UserError
from jlora.hub import cards
from jlora.hub.checkpoints.packed import quantizable
from jlora.models import Model
from jlora.models.model import SCORE
from jlora.types import Params


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    if options.recipe:
        return _run_recipe(options)
    if not (options.model and options.adapter):
        raise UserError("--model and --adapter are required, or --recipe alone, which combines whole models")
    adapters = [_weighted(text) for text in options.adapter]
    if options.adapter_only and options.quant:
        raise UserError("--quant packs a merged model, and --adapter_only writes none")
    if options.gguf or not options.adapter_only:
        refuse_layout(options, "the PEFT adapter that --adapter_only writes")
    if options.gguf and options.dtype:
        raise UserError("--gguf sets the type of what is written, so --dtype has no effect")
    if options.unmeasured and (options.adapter_only or options.data):
        raise UserError("--unmeasured: --data is what is measured, and with --adapter_only nothing is; leave it out")
    if options.unmeasured and options.quant and not options.lossy:
        raise UserError("--unmeasured: what packing would erase is measured unless you say --lossy")
    if options.gguf and options.quant:
        raise UserError("--quant packs a folder for bitsandbytes, --gguf a file for llama.cpp: give one of them")
    require_gguf(options, adapter=options.adapter_only)
    require_out(options, {"--model": options.model} | {f"--adapter={path}": path for path, _ in adapters})
    records = read_records(options)
    dtype = hub.float_dtype(options.dtype) if options.dtype else hub.checkpoint_dtype(options.model)
    exact = hub.exact_dtype(options.model)  # so that sums are rounded only once
    model, base = open_model(options.model, dtype=exact, vocab=options.vocab)
    params = _adapted(base, adapters, options)
    if options.adapter_only:
        _save_adapter(model, params, options)
        return 0
    hub.require_writable(model, params)
    tokenizer = hub.load_tokenizer(options.model, adapters[0][0] if len(adapters) == 1 else None)
    records = encodable(options, records, tokenizer, model.config.vocab_size)
    if options.gguf:  # what the merge kept is measured on the file
        # The model's own tokenizer is copied from its file: a GGUF file has more of it than the object shows.
        differs = hub.tokenizer_differences(hub.load_tokenizer(options.model), tokenizer)
        written = tokenizer if differs else options.model
        with tensor_bar() as bar:
            hub.save_gguf(options.out, model, params, written, dtype=options.gguf, progress=bar, force=options.force)
        merged = params if options.unmeasured else hub.load(options.out, dtype="float32")[1]
    else:
        merged = lora.merge(params, dtype)
    if options.quant:
        merged = _packed(merged, options.quant)
    kept = None if options.unmeasured else print_kept(model, params, merged, tokenizer, records)
    if kept:
        _require_kept(kept, options)
    card = _card(model, params, adapters, kept, options)
    if options.quant:
        hub.save_quantized(options.out, model, merged, tokenizer=tokenizer, card=card, force=options.force)
    elif not options.gguf:
        hub.save_model(options.out, model, merged, tokenizer=tokenizer, card=card, force=options.force)
    print(f"merged model: {options.out}")
    if options.modelfile:
        write_modelfile(options, model, options.model, tokenizer, adapter=False)
    return 0


def _card(
    model: Model, params: Params, adapters: list[tuple[str, float]], kept: lora.Kept | None, options: argparse.Namespace
) -> cards.Card:
    """The merged folder's card: which adapters, with which weights, and what of their update the weights hold."""
    named = [f"`{cards.shown(path)}`" + (f" × {weight:g}" if len(adapters) > 1 else "") for path, weight in adapters]
    by = f", combined by `{options.method or 'linear'}`," if len(adapters) > 1 else ""
    packed = f", and packed as {options.quant}" if options.quant else ""
    how = [f"The LoRA adapter{'s' if by else ''} {', '.join(named)}{by} merged into the base's weights{packed}."]
    how += [f"{kept.summary}."] if kept else []
    relation = "quantized" if options.quant else "finetune"
    return cards.model_card(
        options.out, [options.model], " ".join(how), relation=relation, lora=True, scored=SCORE in params
    )


def _require_kept(report: lora.Kept, options: argparse.Namespace) -> None:
    """Raises UserError if packing erases what it is not allowed to erase."""
    if options.quant and not options.lossy:
        raise UserError(
            f"packing the sum to {options.quant} would leave {report.fraction:.2%} of the update, with an error of "
            f"{report.error:.2g} times its norm: nothing was written. "
            "Keep the adapter beside the packed base, merge in 16 bits, or say --lossy"
        )


def _save_adapter(model: Model, params: Params, options: argparse.Namespace) -> None:
    if options.gguf:
        hub.save_gguf_adapter(options.out, model, params, dtype=options.gguf, force=options.force)
    else:
        resized, layout = options.vocab is not None, adapter_layout(options)
        hub.save_adapter(options.out, params, base=options.model, save_embedding_layers=resized, **layout)
    say_adapter(options.out, gguf=bool(options.gguf))
    if options.modelfile:
        write_modelfile(options, model, options.model, hub.load_tokenizer(options.model), adapter=True)


def _run_recipe(options: argparse.Namespace) -> int:
    unset = parser().get_default
    given = [f"--{name}" for name, value in sorted(vars(options).items()) if value != unset(name)]
    if idle := [name for name in given if name not in ("--recipe", "--out", "--force")]:
        raise UserError(f"{', '.join(idle)}: not with --recipe, whose file says everything")
    require_out(options, {"--recipe": options.recipe})
    with tensor_bar() as bar:
        hub.merge_models(options.recipe, options.out, progress=bar, force=options.force)
    print(f"merged model: {options.out}")
    return 0


def _weighted(text: str) -> tuple[str, float]:
    """(folder, weight) of DIR or DIR:WEIGHT; the weight defaults to 1."""
    folder, colon, weight = text.rpartition(":")
    try:
        return (folder, float(weight)) if colon else (text, 1.0)
    except ValueError:  # the colon is part of the path
        return text, 1.0


def _adapted(base: Params, adapters: list[tuple[str, float]], options: argparse.Namespace) -> Params:
    """The base with the one adapter, or with the mixture that the method makes of several."""
    loaded = [hub.load_adapter(base, folder, options.model) for folder, _ in adapters]
    chosen = {name: getattr(options, name) for name in ("density", "rank") if getattr(options, name) is not None}
    if len(loaded) == 1 and adapters[0][1] == 1 and options.method is None and not chosen:
        return loaded[0]
    weights = [weight for _, weight in adapters]
    named = {f"{folder}": adapter for (folder, _), adapter in zip(adapters, loaded, strict=True)}
    if len(named) < len(loaded):
        raise UserError("--adapter: found a folder twice; give it once, with the sum of its weights")
    params, report = lora.mix(base, named, weights, method=options.method or "linear", seed=options.seed, **chosen)
    print(str(report).partition("\n")[0])
    return params


def _packed(merged: Params, format: str) -> Params:
    """The model with its layers' linears packed as `jlora quantize` packs them."""
    config = quant.QuantConfig(rules=quantizable(format))

    def pack(path: str, leaf: Any) -> Any:
        chosen = None if quant.is_packed(leaf) else quant.leaf_format(path, config)
        return leaf if chosen is None else quant.quantize(jnp.asarray(leaf), chosen, double_quant=config.double_quant)

    return tree.map_with_path(pack, merged)
