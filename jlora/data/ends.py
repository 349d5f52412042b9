"""Where an answer ends: known once, for masks, decoding, rewards and what is exported."""

from collections.abc import Sequence
from typing import Any

from jlora.data.template import template_stop
from jlora.data.vocabulary import fitted, require_rows, unfitted
from jlora.errors import UserError


def end_ids(tokenizer: Any, ends: Sequence[int], rows: int) -> tuple[int, ...]:
    """The tokens that end an answer, of those that the model has a row for: the model's own, the tokenizer's end of
    text, and the one that the chat template writes behind an answer.

    Only single tokens end one. Where a template writes words there and no special token, as "### End", those are text,
    and the end of text stands behind the last answer, in training and afterwards.

    Args:
        ends: the model's own, which config.json or generation_config.json names.
        rows: of the model's embedding.
    """
    return tuple(token for token in _ends(tokenizer, ends) if 0 <= token < rows)


def stop_ids(tokenizer: Any, ends: Sequence[int], rows: int) -> tuple[int, ...]:
    """The `end_ids`, for those who let a model answer.

    Raises:
        UserError: there are such tokens, but the model has a row for none of them: no answer would ever end.
    """
    found = end_ids(tokenizer, ends, rows)
    if not found:
        require_rows(_ends(tokenizer, ends), fitted(tokenizer, rows))
    return found


def _ends(tokenizer: Any, ends: Sequence[int]) -> list[int]:
    candidates = [*ends, tokenizer.eos_token_id, _of_template(tokenizer)]
    return [token for token in dict.fromkeys(candidates) if token is not None]


def _of_template(tokenizer: Any) -> int | None:
    """What the chat template writes behind an answer; None where it has none, or refuses the shortest of chats."""
    if not tokenizer.chat_template:
        return None
    try:
        return template_stop(unfitted(tokenizer))
    except UserError:
        return None
