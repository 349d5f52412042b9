"""Which tokens a model knows: a tokenizer that refuses tokens without a row in the model's embedding."""

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.errors import UserError

# What a user can do about tokens without a row.
RESIZE = (
    "use the tokenizer that belongs to the model, or resize the base: --vocab=tokenizer, "
    "model.resize_vocab='tokenizer' in a recipe, jlora.load(..., vocab='tokenizer')"
)
NAMED = 3
DIRECTIVES = "aAbBcdDeFGhHIjlkmMpRsSTuUVwWxXyYzZ"  # of strftime


class Fitted:
    """A tokenizer that refuses texts with tokens that the model has no row for; otherwise it behaves as the original.

    Lookups beyond an embedding's rows give NaN, and so does everything computed from them.

    Args:
        rows: the number of rows of the model's embedding.
        date: what `strftime_now` of chat templates tells; None for the clock.
    """

    def __init__(self, tokenizer: Any, rows: int, date: datetime.datetime | None = None) -> None:
        self.tokenizer, self.rows, self.date = tokenizer, rows, date

    def apply_chat_template(self, *messages: Any, **settings: Any) -> Any:
        """The tokenizer's `apply_chat_template`, with `strftime_now` telling `date` if there is one."""
        if self.date is not None:
            template = self.tokenizer.get_chat_template(settings.get("chat_template"), settings.get("tools"))
            settings = settings | {"chat_template": _dated(template, self.date)}
        return self.tokenizer.apply_chat_template(*messages, **settings)

    def __call__(self, *texts: Any, **settings: Any) -> Any:
        """The tokenizer's output for the texts.

        Raises:
            UserError: some tokens do not have a row; they are named.
        """
        encoded = self.tokenizer(*texts, **settings)
        require_rows(encoded["input_ids"], self)
        return encoded

    def encode(self, *texts: Any, **settings: Any) -> list[int]:
        """The tokens of a text; raises as a call does."""
        tokens = self.tokenizer.encode(*texts, **settings)
        require_rows(tokens, self)
        return tokens

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not set yet while an object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def _dated(template: str, date: datetime.datetime) -> str:
    """The template with a `strftime_now` of its own, which tells this date.

    That of transformers tells the clock's, and would turn a function that is passed in into text.
    """
    if "strftime_now" not in template:
        return template
    told = ((f"%{flag}{letter}", date.strftime(f"%{flag}{letter}")) for flag in ("", "-") for letter in DIRECTIVES)
    filters = "".join(f"|replace({directive!r}, {text!r})" for directive, text in told)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro -%}}{template}"


def fitted(tokenizer: Any, rows: int, date: datetime.datetime | None = None) -> Fitted:
    """The tokenizer for a model whose embedding has `rows` rows.

    Args:
        date: the date that chat templates see; None for the one that the tokenizer was fitted with, or else today.
    """
    kept = tokenizer.date if isinstance(tokenizer, Fitted) else None
    return Fitted(unfitted(tokenizer), rows, date or kept)


def unfitted(tokenizer: Any) -> Any:
    """The tokenizer inside a fitted one; any other tokenizer as it is."""
    return tokenizer.tokenizer if isinstance(tokenizer, Fitted) else tokenizer


def require_rows(tokens: Sequence[Any] | np.ndarray, tokenizer: Any) -> None:
    """Raises UserError if the model of a fitted tokenizer lacks rows for any of these tokens (or lists of tokens)."""
    if not isinstance(tokenizer, Fitted):
        return
    ids = _flat(tokens)
    beyond = np.unique(ids[(ids < 0) | (ids >= tokenizer.rows)]).tolist()
    if beyond:
        named = [f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token})" for token in beyond[:NAMED]]
        more = [f"{len(beyond) - NAMED} more"] if len(beyond) > NAMED else []
        raise UserError(
            f"the model's embedding has {tokenizer.rows} rows, and none for these tokens of the tokenizer: "
            f"{', '.join(named + more)}; {RESIZE}"
        )


def _flat(tokens: Sequence[Any] | np.ndarray) -> np.ndarray:
    nested = len(tokens) > 0 and not np.isscalar(tokens[0])
    parts = [np.asarray(part, np.int64).ravel() for part in tokens] if nested else [np.asarray(tokens, np.int64)]
    return np.concatenate(parts)
