"""Turns a transformers tokenizer into GGUF metadata with which llama.cpp's implementation gives the same ids."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jlora.ends import end_ids, template_end
from jlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's token types
GPT2_SPLIT = "ByteLevel"  # the split of early byte-level vocabularies
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# (how a text is split before merging, whether whole tokens go before merges) → llama.cpp's name for it.
SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2_SPLIT,), False): "gpt-2",
    (("Digits", GPT2_SPLIT), False): "smollm",
    ((LLAMA3_SPLIT,), True): "llama-bpe",
    ((LLAMA3_SPLIT,), False): "dbrx",
    ((LLAMA3_SPLIT.replace("{1,3}", ""),), False): "qwen2",
    (
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        True,
    ): "tekken",
}
# What may be done to a text before it is split: what llama.cpp does too, and NFC, which it does not do, but almost all
# text is in that form already.
NORMALIZERS = ({"type": "NFC"},)
PIECE_NORMALIZERS = (
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
)
# llama.cpp removes the spaces after special tokens if the model's name matches PHI3, except after those UNSTRIPPED.
PHI3, UNSTRIPPED = r"(?i)(phi)-?(3)", frozenset(("<unk>", "<s>", "<|endoftext|>"))
INSTEAD = "leave the tokenizer out (jlora.hub.save_gguf without one), or take one from a GGUF file of the base model"


def strips_spaces(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether special tokens remove the spaces after them, as Phi-3's do.

    Raises:
        ValueError: tokens remove spaces, or match only whole words, in a way that llama.cpp does not.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    if tokenizer.pad_token != tokenizer.eos_token:  # such padding occurs in no text
        added.pop(tokenizer.pad_token, None)
    stripping = {name for name, token in added.items() if token.rstrip}
    as_phi3 = stripping == set(added) - UNSTRIPPED and {"</s>", *UNSTRIPPED} <= set(tokenizer.get_vocab())
    unknown = {name for name, token in added.items() if token.lstrip or token.single_word}
    unknown |= set() if as_phi3 else stripping
    if unknown:
        raise UserError(
            f"llama.cpp differs in how it treats text around these tokens: {', '.join(sorted(unknown))}; {INSTEAD}"
        )
    return bool(stripping)


def named(name: str, *, strips: bool) -> str:
    """The model's name, changed if llama.cpp would otherwise treat spaces after special tokens wrongly."""
    if not strips:
        return re.sub(PHI3, r"\1 \2", name)
    return name if re.search(PHI3, name) else f"{name} phi-3"


def tokenizer_metadata(tokenizer: "PreTrainedTokenizerBase", rows: int, ends: Sequence[int]) -> dict[str, Any]:
    """GGUF's metadata of a tokenizer.

    Args:
        rows: the number of the embedding's rows; those beyond the vocabulary get filler tokens.
        ends: the tokens that end a text or a turn.

    Raises:
        ValueError: llama.cpp cannot give the same ids, or the vocabulary has ids beyond the rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__} is not from the tokenizers library, so GGUF cannot hold it")
    parts = json.loads(backend.to_str())
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) and max(vocabulary.values()) >= rows:
        raise UserError(f"the tokenizer has ids up to {max(vocabulary.values())}, the model {rows} rows for them")
    if parts["model"].get("type") != "BPE":
        raise UserError(f"GGUF's tokenizers are written for BPE, not for {parts['model'].get('type')!r}")
    pieces = parts["model"].get("byte_fallback", False)
    tokens, kinds = _tokens(parts, vocabulary, rows, pieces=pieces)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in _merges(parts)]
    _check_normalizers(parts, PIECE_NORMALIZERS if pieces else NORMALIZERS)
    found: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": kinds}
    if pieces:  # as in SentencePiece: the pair that joins to the token with the best score is merged first
        found |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": _scores(tokens, merges)}
        found["ggml.add_space_prefix"] = _prepends(parts)
    else:
        found |= {"ggml.model": "gpt2", "ggml.pre": _split(parts)}
        found["ggml.merges"] = [" ".join(_without_spaces(part) for part in merge) for merge in merges]
    found |= _special(tokenizer, ends, rows)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        found["chat_template"] = template if isinstance(template, str) else template.get("default", "")
    return {f"tokenizer.{name}": value for name, value in found.items() if value not in ("", [])}


def _merges(parts: Mapping[str, Any]) -> list:
    return parts["model"].get("merges") or []


def _without_spaces(token: str) -> str:
    # A space separates the two halves of a merge; byte-level vocabularies write spaces as Ġ.
    if " " in token:
        raise UserError(f"a merge of {token!r}: GGUF cannot hold tokens with spaces")
    return token


def _tokens(
    parts: Mapping[str, Any], vocabulary: Mapping[str, int], rows: int, *, pieces: bool
) -> tuple[list[str], list[int]]:
    """(token, type) of every row of the embedding."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, NORMAL
        if pieces and token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            kinds[i] = BYTE
        if pieces and token == parts["model"].get("unk_token"):
            kinds[i] = UNKNOWN
    for added in parts.get("added_tokens") or []:
        if kinds[added["id"]] != UNKNOWN:
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """One score per token, higher for earlier merges, and so low that it is never made for a token without a merge."""
    order: dict[str, int] = {}
    for merge in merges:
        order.setdefault("".join(merge), len(order))
    return [-float(order[token]) if token in order else -1e9 for token in tokens]


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, with sequences flattened."""
    if part is None:
        return []
    return [step for item in part[inner] for step in _steps(item, inner)] if part["type"] == "Sequence" else [part]


def _check_normalizers(parts: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> None:
    unknown = [step for step in _steps(parts.get("normalizer"), "normalizers") if step not in known]
    if unknown:
        raise UserError(
            f"llama.cpp does not do what this tokenizer first does to a text: {json.dumps(unknown)}; {INSTEAD}"
        )


def _split(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the text is split."""
    steps = _steps(parts.get("pre_tokenizer"), "pretokenizers")
    names = tuple(name for step in steps if (name := _step(step)))
    key = names, bool(parts["model"].get("ignore_merges", False))
    if key not in SPLITS or any(step.get("add_prefix_space") for step in steps):
        found = json.dumps(parts.get("pre_tokenizer"))
        raise UserError(f"llama.cpp has no name for how this tokenizer splits text: {found}; {INSTEAD}")
    return SPLITS[key]


def _step(step: Mapping[str, Any]) -> str:
    """What a step splits by; "" for one that only writes bytes as letters."""
    if step["type"] == "ByteLevel":
        return GPT2_SPLIT if step.get("use_regex", True) else ""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "Digits"
    pattern = step.get("pattern", {})
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return pattern.get("Regex", f"the string {pattern.get('String')!r}")
    return json.dumps(step)


def _prepends(parts: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizers = [step["type"] for step in _steps(parts.get("normalizer"), "normalizers")]
    schemes = [step.get("prepend_scheme") for step in _steps(parts.get("pre_tokenizer"), "pretokenizers")]
    return "Prepend" in normalizers or any(scheme in ("always", "first") for scheme in schemes)


def _special(tokenizer: "PreTrainedTokenizerBase", ends: Sequence[int], rows: int) -> dict[str, Any]:
    """The ids of tokens that begin, end and pad a text, and whether begin and end are added to one."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    # The token that the chat template writes after an answer ends a turn; llama.cpp has room for one such token.
    found_ends = end_ids(tokenizer, ends, rows)
    turn = [end for end in (template_end(tokenizer), *found_ends) if end in found_ends and end != ids["eos"]]
    if ids["eos"] is not None and turn:
        ids["eot"] = turn[0]
    found: dict[str, Any] = {f"ggml.{name}_token_id": value for name, value in ids.items() if value is not None}
    text = tokenizer("a").input_ids
    found["ggml.add_bos_token"] = bool(text) and ids["bos"] is not None and text[0] == ids["bos"]
    found["ggml.add_eos_token"] = bool(text) and ids["eos"] is not None and text[-1] == ids["eos"]
    return found
