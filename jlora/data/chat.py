"""Records to tokens: the tokenizer's own chat template, and which tokens the loss counts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from jlora.data.records import Record, describe_faults


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document: its tokens, and for each whether the loss is taken on predicting it."""

    tokens: Int32[np.ndarray, " T"]
    trained: Bool[np.ndarray, " T"]


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """What became of the records: counts of the examples kept, and of what was cut or left out.

    Args:
      examples, tokens, trained_tokens: what is kept.
      cut: examples kept that lost their end.
      dropped: records left out because they were too long.
      untrained: records left out because no token of theirs would be trained (after cutting).
    """

    examples: int
    tokens: int
    trained_tokens: int
    cut: int
    dropped: int
    untrained: int


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    seq_len: int,
    overlong: str = "drop",
    completion_only: bool = True,
) -> tuple[list[Example], EncodeReport]:
    """Examples for the records that can be trained on, in order, and a report of what was left out.

    The loss counts every assistant turn of `messages`, and the completion of a prompt, each with the token that ends
    it, so that the model learns to stop. Nothing behind the last counted token is kept.
    """
    stop = _template_stop(records, tokenizer)
    examples, faults = [], []
    cut = dropped = untrained = 0
    for number, record in enumerate(records, start=1):
        try:
            tokens, trained = _encode_record(record, tokenizer, stop)
        except ValueError as error:
            faults.append(f"record {number}: {error}")
            continue
        length = int(np.flatnonzero(trained)[-1]) + 1 if trained.any() else 0
        tokens, trained = tokens[:length], trained[:length] | (not completion_only)
        if too_long := len(tokens) > seq_len:
            if overlong == "error":
                faults.append(f"record {number}: found {len(tokens)} tokens, expected at most {seq_len}")
                continue
            if overlong == "drop":
                dropped += 1
                continue
            tokens, trained = tokens[:seq_len], trained[:seq_len]
        if not trained[1:].any():  # nothing predicts the first token
            untrained += 1
            continue
        cut += too_long
        examples.append(Example(tokens, trained))
    if faults:
        raise ValueError(describe_faults(f"{len(faults)} of {len(records)} records cannot be encoded", faults))
    report = _report(examples, cut, dropped, untrained)
    if not examples:
        raise ValueError(
            f"no token to train on in {len(records)} records: {dropped} are longer than {seq_len} tokens and were "
            f"dropped, {untrained} have no completion token within {seq_len} tokens; raise train.seq_len"
        )
    return examples, report


def split_prompt(record: Record) -> tuple[str | list[dict[str, Any]], str]:
    """The prompt to generate from, and the text that the record gives as the answer.

    With messages the answer is the last assistant message and the prompt is everything before it.
    """
    if _is_text(record):
        return record["prompt"], record["completion"]
    messages, _ = _conversation(record)
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last].get("content") or ""


def _template_stop(records: Sequence[Record], tokenizer: Any) -> int | None:
    """The first special token that the template writes behind an assistant's words, or None when it writes none."""
    chats = sum(not _is_text(record) for record in records)
    if not chats:
        return None
    if not tokenizer.chat_template:
        raise ValueError(
            f"{chats} of {len(records)} records are chats, but the tokenizer has no chat template; use a model whose "
            'tokenizer has one, or records with "prompt" and "completion" as plain text'
        )
    words = "jlora"
    text = _render([{"role": "user", "content": "?"}, {"role": "assistant", "content": words}], tokenizer)
    behind = text.rpartition(words)[2]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    return next((t for t in tokenizer(behind, add_special_tokens=False)["input_ids"] if t in special), None)


def _is_text(record: Record) -> bool:
    return "messages" not in record and isinstance(record["prompt"], str) and isinstance(record["completion"], str)


def _conversation(record: Record) -> tuple[list[dict[str, Any]], int]:
    """All messages, and the index of the first that may be trained."""
    if "messages" in record:
        return record["messages"], 0
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return prompt + completion, len(prompt)


def _encode_record(record: Record, tokenizer: Any, stop: int | None) -> tuple[np.ndarray, np.ndarray]:
    if _is_text(record):
        return _encode_text(record["prompt"], record["completion"], tokenizer)
    messages, first = _conversation(record)
    tokens = _template_tokens(messages, tokenizer)
    if stop is None and messages[-1]["role"] == "assistant":
        tokens = _end_with_eos(tokens, tokenizer)
    trained = np.zeros(len(tokens), np.bool_)
    for index in range(first, len(messages)):
        if messages[index]["role"] == "assistant":
            start, end = _turn(messages, index, tokens, tokenizer, stop)
            trained[start:end] = True
    return tokens, trained


def _encode_text(prompt: str, completion: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    before = np.asarray(tokenizer(prompt)["input_ids"], np.int32)
    tokens = _end_with_eos(np.asarray(tokenizer(prompt + completion)["input_ids"], np.int32), tokenizer)
    trained = np.arange(len(tokens)) >= _common_prefix(before, tokens)
    return tokens, trained


def _turn(
    messages: list[dict[str, Any]], index: int, tokens: np.ndarray, tokenizer: Any, stop: int | None
) -> tuple[int, int]:
    """Where the assistant turn `messages[index]` starts and ends (exclusive, its stop token inside) in `tokens`."""
    start = _common_prefix(_template_tokens(messages[:index], tokenizer, add_generation_prompt=True), tokens)
    if index + 1 == len(messages):
        limit = len(tokens)
    else:
        # Some templates leave the reasoning out of earlier turns, so a shared prefix may end inside the turn. It is
        # the answer only where there is no stop token to look for.
        limit = _common_prefix(_template_tokens(messages[: index + 1], tokenizer), tokens)
    stops = np.flatnonzero(tokens[start:] == stop) if stop is not None else []
    return start, start + int(stops[0]) + 1 if len(stops) else limit


def _template_tokens(
    messages: list[dict[str, Any]], tokenizer: Any, *, add_generation_prompt: bool = False
) -> np.ndarray:
    text = _render(messages, tokenizer, add_generation_prompt=add_generation_prompt)
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _render(messages: list[dict[str, Any]], tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    import jinja2  # transformers renders chat templates with it

    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses the roles {roles}: {error}") from error


def _end_with_eos(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no end-of-text token, so the model could not learn to stop; set eos_token")
    return tokens if len(tokens) and tokens[-1] == eos else np.append(tokens, np.int32(eos))


def _common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    shared = min(len(first), len(second))
    different = np.flatnonzero(first[:shared] != second[:shared])
    return int(different[0]) if len(different) else shared


def _report(examples: list[Example], cut: int, dropped: int, untrained: int) -> EncodeReport:
    return EncodeReport(
        examples=len(examples),
        tokens=sum(len(example.tokens) for example in examples),
        trained_tokens=sum(int(example.trained[1:].sum()) for example in examples),
        cut=cut,
        dropped=dropped,
        untrained=untrained,
    )
