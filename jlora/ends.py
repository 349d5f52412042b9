"""Where an answer ends: known once, for masks, decoding, rewards and what is exported."""

from collections.abc import Sequence
from typing import Any

# A chat whose rendering shows what a template writes behind an answer: what stands behind these words.
WORDS = "jlora"
CHAT = ({"role": "user", "content": "?"}, {"role": "assistant", "content": WORDS})


def end_ids(tokenizer: Any, ends: Sequence[int], rows: int) -> tuple[int, ...]:
    """The tokens that end an answer, of those that the model has a row for: the model's own, the tokenizer's end of
    text, and the one that the chat template writes behind an answer.

    Only single tokens end one. Where a template writes words there and no special token, as "### End", those are text,
    and the end of text stands behind the last answer, in training and afterwards.

    Args:
        ends: the model's own, which config.json or generation_config.json names.
        rows: of the model's embedding.
    """
    return tuple(token for token in candidates(tokenizer, ends) if 0 <= token < rows)


def candidates(tokenizer: Any, ends: Sequence[int]) -> list[int]:
    """The tokens that would end an answer, whether the model has rows for them or not."""
    found = [*ends, tokenizer.eos_token_id, template_end(tokenizer)]
    return [token for token in dict.fromkeys(found) if token is not None]


def template_end(tokenizer: Any) -> int | None:
    """The token that the chat template writes behind an answer; None without a template, or where it writes none."""
    if not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template(list(CHAT), tokenize=False)
    except Exception:  # noqa: BLE001 (templates raise what they like; one that refuses so short a chat says nothing)
        return None
    tokens, place = behind_words(text, tokenizer)
    return tokens[place] if place < len(tokens) else None


def behind_words(text: str, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens behind the words of a rendered `CHAT`, and the place of the first special one."""
    tokens = tokenizer(text.rpartition(WORDS)[2], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    return tokens, next((index for index, token in enumerate(tokens) if token in special), len(tokens))
