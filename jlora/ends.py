"""Where an answer ends: one definition for loss masks, decoding, rewards and exports."""

from collections.abc import Callable, Sequence
from typing import Any

# A chat whose rendering shows what a template writes after an answer: whatever follows these words.
WORDS = "jlora"
CHAT = ({"role": "user", "content": "?"}, {"role": "assistant", "content": WORDS})


def end_ids(tokenizer: Any, ends: Sequence[int], rows: int) -> tuple[int, ...]:
    """The tokens that end an answer, those that the model has no row for left out.

    They are the model's own, the tokenizer's end of text, and the one that the chat template writes after an answer.
    Only single tokens end an answer. If a template writes words there, such as "### End", and no special token, those
    words are text, and the end of text follows the last answer, in training and in generation.

    Args:
        ends: the model's own end tokens, as named by config.json or generation_config.json.
        rows: the number of rows of the model's embedding.
    """
    return tuple(token for token in candidates(tokenizer, ends) if 0 <= token < rows)


def candidates(tokenizer: Any, ends: Sequence[int]) -> list[int]:
    """The tokens that end an answer, whether or not the model has rows for them."""
    found = [*ends, tokenizer.eos_token_id, template_end(tokenizer)]
    return [token for token in dict.fromkeys(found) if token is not None]


def template_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an answer; None without a template or such a token."""
    if not tokenizer.chat_template:
        return None
    try:
        text = chat_text(lambda chat: tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # noqa: BLE001 (templates raise what they like; one that refuses so short a chat says nothing)
        return None
    tokens, place = behind_words(text, tokenizer)
    return tokens[place] if place < len(tokens) else None


def chat_text(render: Callable[[list[dict[str, Any]]], str]) -> str:
    """`CHAT` as a template renders it.

    Contents are given as lists of parts if the template reads only those, as some templates of models that also see
    images do.

    Raises:
        Exception: what `render` raised for plain text, if it refuses both forms.
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
    """The tokens after the words of a rendered `CHAT`, and the index of the first special one (or their number)."""
    tokens = tokenizer(text.rpartition(WORDS)[2], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    return tokens, next((index for index, token in enumerate(tokens) if token in special), len(tokens))
