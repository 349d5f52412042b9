"""`jlora quantize`: a model's linears in 4 or 8 bits, as a folder that transformers opens with bitsandbytes."""

import argparse

from jlora import hub, quant, tree
from jlora.hub.quantized import FORMATS, quantizable


def run(arguments: list[str]) -> int:
    """0; what is wrong is raised."""
    options = _parser().parse_args(arguments)
    config = quant.QuantConfig(rules=quantizable(options.quant), double_quant=not options.no_double_quant)
    dtype = options.dtype or hub.checkpoint_dtype(options.model)
    model, params = hub.load(options.model, dtype=dtype, quant=config)
    hub.save_quantized(options.out, model, params, tokenizer=hub.load_tokenizer(options.model))
    print(f"{options.quant} model: {options.out} ({8 * tree.nbytes(params) / tree.count(params):.2f} bits a weight)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jlora quantize",
        description="Pack the linears of every layer; embeddings, head and norms stay as they are.",
        epilog="The folder opens in transformers with bitsandbytes and in jlora, with the same values.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="a Hugging Face folder, a Hub id or a GGUF file"
    )
    parser.add_argument("--quant", default="nf4", metavar="FORMAT", help=f"{', '.join(FORMATS)} (default: nf4)")
    parser.add_argument(
        "--no-double-quant", action="store_true", help="4 bits: block scales in float32 (4.5 bits a weight, not 4.13)"
    )
    parser.add_argument("--dtype", help="of all that is not packed (default: the checkpoint's)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    return parser
