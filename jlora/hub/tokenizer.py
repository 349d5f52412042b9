"""The transformers tokenizer of a checkpoint, chat template included."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.errors import MissingFileError, MissingPackageError
from jlora.hub.gguf import tokenizer_fields
from jlora.hub.source import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How byte-level vocabularies split a text before merging, by GGUF's names; True: every digit stands alone.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "gpt2": False, "default": False}
CONTROL, USER_DEFINED = 3, 4  # GGUF's token types


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that belongs to the model at `source`: a folder, a Hub id or a GGUF file.

    Raises:
        FileNotFoundError: there is no such source, or it has no tokenizer.
        ImportError: a GGUF file with a tokenizer that only transformers can build, which needs PyTorch for it.
    """
    # Slow to import, and of no use to those who bring token ids.
    import transformers

    path = locate(source)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if not any(path.glob("tokenizer*")) and not any(path.glob("vocab*")):
        raise MissingFileError(f"{path} has no tokenizer.json, tokenizer.model or vocab file")
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _from_gguf(path: Path) -> "PreTrainedTokenizerBase":
    import transformers

    fields = tokenizer_fields(path)
    if not fields.get("ggml.tokens"):
        raise MissingFileError(f"{path} has no tokenizer (no tokenizer.ggml.tokens in its metadata)")
    if fields.get("ggml.model") == "gpt2" and fields.get("ggml.pre", "default") in SPLITS_DIGITS:
        return _byte_level(fields)
    if importlib.util.find_spec("torch") is None:
        raise MissingPackageError(
            f"{path} has a tokenizer of the kind {fields.get('ggml.model')!r} / {fields.get('ggml.pre')!r}, which "
            "transformers builds, and for GGUF files it needs PyTorch: pip install torch",
            name="torch",
        )
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _byte_level(fields: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """Byte-level BPE (GPT-2, Radford et al. 2019) from what a GGUF file says of it."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = fields["ggml.tokens"]
    types = fields.get("ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ")) for merge in fields.get("ggml.merges") or ()]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = SPLITS_DIGITS[fields.get("ggml.pre", "default")]
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    spaced = bool(fields.get("ggml.add_space_prefix", False))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=spaced)])
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, kind in kinds if kind == USER_DEFINED])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"ggml.{key}_token_id") for name, key in named.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    begin = [special["bos_token"]] if fields.get("ggml.add_bos_token") and "bos_token" in special else []
    end = [special["eos_token"]] if fields.get("ggml.add_eos_token") and "eos_token" in special else []
    if begin or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *begin, "$B", *end],
            special_tokens=[(token, tokens.index(token)) for token in {*begin, *end}],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )
