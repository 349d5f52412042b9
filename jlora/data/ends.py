"""The tokens at which a model stops answering."""

from collections.abc import Sequence
from typing import Any

from jlora.data.vocabulary import fitted, require_rows, unfitted
from jlora.ends import candidates, end_ids


def stop_ids(tokenizer: Any, ends: Sequence[int], rows: int) -> tuple[int, ...]:
    """The tokens that end an answer, for generating one; the arguments are those of `jlora.ends.end_ids`.

    Raises:
        UserError: the model has no row for any of these tokens, so no answer would ever end.
    """
    tokenizer = unfitted(tokenizer)
    found = end_ids(tokenizer, ends, rows)
    if not found:
        require_rows(candidates(tokenizer, ends), fitted(tokenizer, rows))
    return found
