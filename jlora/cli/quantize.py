"""`jlora quantize`: packs a model's linears in 4 or 8 bits, in a folder that transformers opens with bitsandbytes."""

import argparse
from typing import Any

from jlora import hub, quant, tree
from jlora.cli.model import encodable, open_model, read_records, require_out
from jlora.errors import UserError
from jlora.hub import cards
from jlora.hub.checkpoints.packed import quantizable
from jlora.train.evaluation.sensitivity import measure


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    if options.data and options.bits is None:
        raise UserError("--data measures where 16 bits matter most, so it needs --bits, the bits per weight to spend")
    require_out(options, {"--model": options.model})
    config = quant.QuantConfig(rules=quantizable(options.quant), double_quant=not options.no_double_quant)
    dtype = options.dtype or hub.checkpoint_dtype(options.model)
    tokenizer = hub.load_tokenizer(options.model)
    if options.bits is not None:
        config = _mixed(options, config, dtype, tokenizer)
    model, params = open_model(options.model, dtype=dtype, quant=config, vocab=options.vocab)
    size = f"{8 * tree.nbytes(params) / tree.count(params):.2f} bits a weight"
    how = f"The linears of the layers packed as {options.quant}: {size}."
    card = cards.model_card(options.out, [options.model], how, relation="quantized")
    hub.save_quantized(options.out, model, params, tokenizer=tokenizer, card=card, force=options.force)
    print(f"{options.quant} model: {options.out} ({size})")
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
