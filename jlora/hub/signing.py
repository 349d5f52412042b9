"""A last line by which jlora knows a text that it wrote, and that nobody has changed since."""

import hashlib
import re

_LINE = "jlora wrote all above this line, unchanged if its digest is "
_DIGITS = 16


def signed(text: str, comment: str) -> str:
    """The text, which ends with a line break, and the line.

    Args:
        comment: how the text's format writes a comment, with {} for the words.
    """
    return f"{text}{comment.format(_LINE + _digest(text))}\n"


def is_as_signed(text: str) -> bool:
    """Whether the text is one of `signed`."""
    above, found, _ = text.rpartition(_LINE)
    above = above[: above.rfind("\n") + 1]
    last = text[len(above) :]
    return bool(found) and last.count("\n") == 1 and re.findall(rf"[0-9a-f]{{{_DIGITS}}}", last) == [_digest(above)]


def unsigned(text: str) -> str:
    """The text without such a line."""
    return re.sub(rf"^.*{re.escape(_LINE)}.*\n?", "", text, flags=re.MULTILINE)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
