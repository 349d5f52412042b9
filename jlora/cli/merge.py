"""`jlora merge`: bakes adapters into their base, or combines several into one."""

import argparse
from typing import Any

import jax.numpy as jnp

from jlora import hub, lora, quant, tree
from jlora.cli.kept import print_kept
from jlora.cli.model import (
    adapter_layout,
    add_force_option,
    add_gguf_option,
    add_layout_options,
    add_on_error_option,
    add_source_option,
    add_vocab_option,
    command,
    encodable,
    open_model,
    rank,
    read_records,
    refuse_layout,
    require_out,
    say_adapter,
    tensor_bar,
)
from jlora.errors import UserError
from jlora.hub.checkpoints.packed import quantizable
from jlora.lora.mixing import METHODS
from jlora.models import Model
from jlora.types import Params


def run(arguments: list[str]) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    if any(argument.startswith("--recipe") for argument in arguments):
        return _run_recipe(_recipe_parser().parse_args(arguments))
    options = _parser().parse_args(arguments)
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
    if options.gguf:
        hub.require_gguf(options.out, options.gguf, adapter=options.adapter_only)
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
            hub.save_gguf(options.out, model, params, written, dtype=options.gguf, progress=bar)
        merged = params if options.unmeasured else hub.load(options.out, dtype="float32")[1]
    else:
        merged = lora.merge(params, dtype)
    if options.quant:
        merged = _packed(merged, options.quant)
    if not options.unmeasured:
        _require_kept(print_kept(model, params, merged, tokenizer, records), options)
    if options.quant:
        hub.save_quantized(options.out, model, merged, tokenizer=tokenizer)
    elif not options.gguf:
        hub.save_model(options.out, model, merged, tokenizer=tokenizer)
    print(f"merged model: {options.out}")
    return 0


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
        hub.save_gguf_adapter(options.out, model, params, dtype=options.gguf)
    else:
        resized, layout = options.vocab is not None, adapter_layout(options)
        hub.save_adapter(options.out, params, base=options.model, save_embedding_layers=resized, **layout)
    say_adapter(options.out, gguf=bool(options.gguf))


def _run_recipe(options: argparse.Namespace) -> int:
    require_out(options, {"--recipe": options.recipe})
    with tensor_bar() as bar:
        hub.merge_models(options.recipe, options.out, progress=bar)
    print(f"merged model: {options.out}")
    return 0


def _recipe_parser() -> argparse.ArgumentParser:
    parser = command(
        "merge",
        usage="jlora merge --recipe=FILE.yaml --out=DIR",
        description="Combine whole models, tensor by tensor, as a recipe in mergekit's form says.",
    )
    parser.add_argument("--recipe", required=True, metavar="FILE.yaml", help="merge_method, models or slices, …")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    add_force_option(parser)
    return parser


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


def _parser() -> argparse.ArgumentParser:
    parser = command(
        "merge",
        "Merge an adapter, or a mixture of several, into the model, and report how much of the update is kept.",
        epilog="Sums are formed in float32 on the unpacked base and rounded once. The base itself is not changed: to "
        "unmerge, use it again. `jlora merge --recipe=FILE.yaml --out=DIR` combines whole models instead.",
    )
    add_source_option(parser)
    parser.add_argument(
        "--adapter", required=True, action="append", metavar="DIR[:WEIGHT]", help="a PEFT folder; may be repeated"
    )
    parser.add_argument("--method", help=f"for several adapters: {', '.join(METHODS)} (default: linear)")
    parser.add_argument("--density", type=float, help="the share of values that pruning methods keep")
    parser.add_argument("--rank", type=rank, help="rank of the mixture, or the share of its energy to keep, as 0.99")
    parser.add_argument("--seed", type=int, default=0, help="seed of methods that draw at random (default: 0)")
    parser.add_argument("--adapter_only", action="store_true", help="write the mixture as an adapter")
    add_vocab_option(parser)
    add_layout_options(parser)
    add_gguf_option(parser)
    parser.add_argument("--quant", metavar="FORMAT", help="pack the merged model; needs --lossy")
    parser.add_argument("--lossy", action="store_true", help="pack although that erases small updates")
    parser.add_argument("--dtype", help="dtype of the folder (default: the checkpoint's; bfloat16 for blocks of GGUF)")
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
