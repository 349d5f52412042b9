"""Text and messages to tokens: the tokenizer, its own chat template, and what that writes behind an answer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.data.vocabulary import require_rows
from jlora.ends import CHAT, behind_words
from jlora.errors import UserError


def template_variables(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record hands to the chat template besides its messages: its tools, and its chat_template_kwargs."""
    return ({"tools": record["tools"]} if "tools" in record else {}) | record.get("chat_template_kwargs", {})


def text_tokens(text: str, tokenizer: Any, *, end: bool = False) -> np.ndarray:
    """The tokens of plain text; with `end` the last one is the tokenizer's end-of-text token.

    A text that begins with the beginning-of-text token, as a rendered chat does, gets no second one.
    """
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    tokens = np.asarray(tokenizer(text, add_special_tokens=not begun)["input_ids"], np.int32)
    return end_with_eos(tokens, tokenizer) if end else tokens


def end_with_eos(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    """The tokens with the tokenizer's end-of-text token as the last one."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end-of-text token, so the model could not learn to stop; set eos_token")
    require_rows([eos], tokenizer)
    return tokens if len(tokens) and tokens[-1] == eos else np.append(tokens, np.int32(eos))


def template_tokens(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """The tokens of what `render` writes."""
    text = render(messages, tokenizer, add_generation_prompt=add_generation_prompt, variables=variables)
    return rendered_tokens(text, tokenizer)


def rendered_tokens(text: str, tokenizer: Any) -> np.ndarray:
    """The tokens of what a chat template wrote, which has its special tokens in it."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def render(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text that the chat template makes of the messages, with `variables` of its own such as tools.

    Raises:
        ValueError: the template refuses the messages.
    """
    import jinja2  # transformers renders chat templates with it

    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **(variables or {})
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses the roles {roles}: {error}") from error


def require_template(tokenizer: Any, chats: int, records: int) -> None:
    """Raises ValueError when there are chats and the tokenizer has no chat template."""
    if chats and not tokenizer.chat_template:
        raise UserError(
            f"{chats} of {records} records are chats, but the tokenizer has no chat template; use a model whose "
            'tokenizer has one, or records with "prompt" and "completion" as plain text'
        )


def template_stop(tokenizer: Any) -> int | None:
    """The first special token that the template writes behind an assistant's words, or None when it writes none."""
    tokens, stop = _behind_answer(tokenizer)
    return tokens[stop] if stop < len(tokens) else None


def template_tail(tokenizer: Any) -> list[int]:
    """The tokens that the chat template writes behind the one that ends an answer; none without a template."""
    if not tokenizer.chat_template:
        return []
    tokens, stop = _behind_answer(tokenizer)
    return tokens[stop + 1 :]


def as_messages(side: str | list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    """Messages as they are, and a text as one message."""
    return [{"role": role, "content": side}] if isinstance(side, str) else side


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading tokens are the same."""
    shared = min(len(first), len(second))
    different = np.flatnonzero(first[:shared] != second[:shared])
    return int(different[0]) if len(different) else shared


def _behind_answer(tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that the template writes behind an assistant's words, and the place of the first special one."""
    return behind_words(render(list(CHAT), tokenizer), tokenizer)
