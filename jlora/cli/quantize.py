"""`jlora quantize`: packs a model's linears in 4 or 8 bits, in a folder that transformers opens with bitsandbytes."""

import argparse
from typing import Any

from jlora import hub, quant, tree
from jlora.cli.model import (
    add_force_option,
    add_on_error_option,
    add_source_option,
    add_vocab_option,
    command,
    encodable,
    open_model,
    read_records,
    require_out,
)
from jlora.errors import UserError
from jlora.hub.checkpoints.methods import BY_FORMAT
from jlora.hub.checkpoints.packed import quantizable
from jlora.train.evaluation.sensitivity import measure


def run(arguments: list[str]) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    options = _parser().parse_args(arguments)
    if options.data and options.bits is None:
        raise UserError("--data measures where 16 bits matter most, so it needs --bits, the bits per weight to spend")
    require_out(options, {"--model": options.model})
    config = quant.QuantConfig(rules=quantizable(options.quant), double_quant=not options.no_double_quant)
    dtype = options.dtype or hub.checkpoint_dtype(options.model)
    tokenizer = hub.load_tokenizer(options.model)
    if options.bits is not None:
        config = _mixed(options, config, dtype, tokenizer)
    model, params = open_model(options.model, dtype=dtype, quant=config, vocab=options.vocab)
    hub.save_quantized(options.out, model, params, tokenizer=tokenizer)
    print(f"{options.quant} model: {options.out} ({8 * tree.nbytes(params) / tree.count(params):.2f} bits a weight)")
    return 0


def _mixed(options: argparse.Namespace, config: quant.QuantConfig, dtype: Any, tokenizer: Any) -> quant.QuantConfig:
    """The config with rules that keep the kernels that packing hurts most in 16 bits, as bitsandbytes' folders can."""
    records = read_records(options)
    model, params = hub.load(options.model, dtype=dtype, vocab=options.vocab)
    records = encodable(options, records, tokenizer, model.config.vocab_size)
    found = quant.candidates(params, config)
    quant.choose(found, dict.fromkeys((kernel.name for kernel in found), 0.0), options.bits, config)  # is it possible?
    if records:
        damage = measure(model, params, tokenizer, records, config)
    else:
        damage = quant.weight_damage(params, config)
    chosen = quant.choose(found, damage, options.bits, config)
    kept = len(chosen.rules) - len(config.rules)
    print(f"{kept} of {len(found)} kernels stay in 16 bits: {options.bits:g} bits a weight of the layers' linears")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = command(
        "quantize",
        "Pack the linears of every layer (mxfp4: gpt-oss's experts); embeddings, head and norms stay as they are.",
        epilog="The folder opens in transformers with bitsandbytes and in jlora, with the same values.",
    )
    add_source_option(parser)
    parser.add_argument("--quant", default="nf4", metavar="FORMAT", help=f"{', '.join(BY_FORMAT)} (default: nf4)")
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
    parser.add_argument(
        "--dtype", help="dtype of what is not packed (default: the checkpoint's; bfloat16 for GGUF's blocks)"
    )
    add_vocab_option(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    add_force_option(parser)
    return parser
