"""The tokens at which a model stops answering."""

from collections.abc import Sequence
from typing import Any

from jlora.data.vocabulary import fitted, require_rows, unfitted
from jlora.ends import candidates, end_ids


def stop_ids(tokenizer: Any, ends: Sequence[int], rows: int) -> tuple[int, ...]:
    """The tokens that end an answer (`jlora.ends.end_ids`, whose arguments these are), for those who generate one.

    Raises:
        UserError: there are such tokens, but the model has a row for none of them: no answer would ever end.
    """
    tokenizer = unfitted(tokenizer)
    found = end_ids(tokenizer, ends, rows)
    if not found:
        require_rows(candidates(tokenizer, ends), fitted(tokenizer, rows))
    return found
