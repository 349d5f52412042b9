"""Where an answer ends: known once, for masks, decoding, rewards and what is exported."""

from collections.abc import Callable, Sequence
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
        text = chat_text(lambda chat: tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # noqa: BLE001 (templates raise what they like; one that refuses so short a chat says nothing)
        return None
    tokens, place = behind_words(text, tokenizer)
    return tokens[place] if place < len(tokens) else None


def chat_text(render: Callable[[list[dict[str, Any]]], str]) -> str:
    """What a template makes of `CHAT`; with contents as lists of parts where it reads no other, as those of models that
    also see images do.

    Raises:
        Exception: whatever `render` raises of the first.
    """
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    texts, refused = [], None
    for chat in (list(CHAT), parts):
        try:
            texts.append(render(chat))
        except Exception as error:  # noqa: BLE001 (raised below where the other form does no better)
            refused = refused or error
    if not texts:
        raise refused
    return next((text for text in texts if WORDS in text), texts[0])


def behind_words(text: str, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens behind the words of a rendered `CHAT`, and the place of the first special one."""
    tokens = tokenizer(text.rpartition(WORDS)[2], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    return tokens, next((index for index, token in enumerate(tokens) if token in special), len(tokens))
