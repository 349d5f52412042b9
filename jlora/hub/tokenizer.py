"""Loads the transformers tokenizer of a checkpoint, including its chat template."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.errors import MissingFileError, MissingPackageError, UserError
from jlora.hub.checkpoints.source import locate, locate_adapter
from jlora.hub.gguf.reading import tokenizer_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GGUF's names for how byte-level vocabularies split a text before merging → whether every digit is split off.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "gpt2": False, "default": False}
# Without one of these, transformers makes an empty tokenizer from the other files.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
CONTROL, USER_DEFINED = 3, 4  # GGUF's token types
TRIAL = "Some faults show only once a text is read."


def load_tokenizer(source: str | Path, adapter: str | Path | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of the model at `source`: a folder, a Hub id or a GGUF file.

    No code from the folder is run, and no pickle is opened.

    Args:
        adapter: an adapter folder. If it holds a tokenizer, as many trainers write one, that is used, since the adapter
            was trained with it; a warning is given if it differs from the model's.

    Raises:
        FileNotFoundError: there is no such source, or it has no tokenizer.
        UserError: transformers cannot open the tokenizer, or it cannot tokenize a text.
        ImportError: a GGUF file has a tokenizer that only transformers can build, and PyTorch is not installed.
    """
    path = locate(source)
    if adapter and (own := _own_tokenizer(adapter)) is not None:
        if parts := tokenizer_differences(load_tokenizer(source), own):
            warnings.warn(
                f"{adapter} holds a tokenizer that differs from that of {source} in its {' and '.join(parts)}: the "
                "adapter's is used",
                stacklevel=2,
            )
        return own
    if path.suffix == ".gguf":
        return _opened(path, lambda: _from_gguf(path))
    if not has_tokenizer(path):
        raise MissingFileError(f"{path} has no tokenizer.json, tokenizer.model or vocab file")
    return _of_folder(path)


def _of_folder(path: Path) -> "PreTrainedTokenizerBase":
    # Slow to import, and not needed if the user has token ids.
    import transformers

    return _opened(path, lambda: transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False))


def say_unused_tokenizer(tokenizer: "PreTrainedTokenizerBase", adapter: str | Path) -> None:
    """Warns if the adapter's folder holds a tokenizer that differs from the one in use."""
    own = _own_tokenizer(adapter)
    if own is not None and (parts := tokenizer_differences(tokenizer, own)):
        warnings.warn(
            f"{adapter} holds a tokenizer that differs from the model's in its {' and '.join(parts)}: the model's is "
            "used. For the adapter's, copy its files into the model's folder",
            stacklevel=2,
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))


def _own_tokenizer(adapter: str | Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in the adapter's folder; None if it has no vocabulary, or, with a warning, cannot be opened."""
    folder = locate_adapter(adapter)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        return None
    try:
        return _of_folder(folder)
    except UserError as error:
        warnings.warn(f"{adapter}: its own tokenizer is ignored, the model's is used: {error}", stacklevel=3)
        return None


def tokenizer_differences(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> list[str]:
    """The parts in which the two tokenizers differ: "vocabulary", "chat template", "end of text"; empty if in none."""
    pairs = {
        "vocabulary": (one.get_vocab(), other.get_vocab()),
        "chat template": (one.chat_template, other.chat_template),
        "end of text": (one.eos_token, other.eos_token),
    }
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]


def _opened(path: Path, open_it: Callable[[], "PreTrainedTokenizerBase"]) -> "PreTrainedTokenizerBase":
    """The tokenizer, after it has tokenized a text as a trial.

    transformers and tokenizers raise errors of any class, even a bare Exception, and Rust's panics are not even that.
    """
    try:
        tokenizer = open_it()
        tokenizer.decode(tokenizer(TRIAL)["input_ids"])
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        files = ", ".join(sorted(file.name for file in path.glob("tokenizer*"))) if path.is_dir() else path.name
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: the tokenizer ({files}) cannot be opened: {type(error).__name__}: {reason}. Take its files from "
            "the original model again"
        ) from error
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise UserError(f"{path}: chat_template is {type(tokenizer.chat_template).__name__}, expected a text")
    return tokenizer


def _from_gguf(path: Path) -> "PreTrainedTokenizerBase":
    import transformers

    fields = tokenizer_fields(path)
    if not fields.get("ggml.tokens"):
        raise MissingFileError(f"{path} has no tokenizer (no tokenizer.ggml.tokens in its metadata)")
    if is_byte_level(fields):
        return _byte_level(fields)
    if importlib.util.find_spec("torch") is None:
        raise MissingPackageError(
            f"{path} has a tokenizer of the kind {fields.get('ggml.model')!r} / {fields.get('ggml.pre')!r}, which "
            "transformers builds, and for GGUF files it needs PyTorch: pip install torch",
            name="torch",
        )
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def is_byte_level(fields: Mapping[str, Any]) -> bool:
    """Whether jlora builds a GGUF file's tokenizer itself, from its metadata `fields`."""
    return fields.get("ggml.model") == "gpt2" and fields.get("ggml.pre", "default") in SPLITS_DIGITS


def _byte_level(fields: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """Byte-level BPE (GPT-2, Radford et al. 2019) from a GGUF file's metadata."""
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
