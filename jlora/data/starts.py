"""The common start of two answers: whether it is the prompt, and the answers without a prompt that they repeat."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.data.messages import Message

Answer = str | list[Message]

_SYSTEM_ROLES = ("system", "developer")
# Columns that describe a row and ask nothing: names that end in one of these words.
_ABOUT_THE_ROW = re.compile(
    r"(?:.*[_\-. ])?(?:id|ids|uid|uuid|hash|index|source|sources|origin|dataset|subset|config|category|categories|"
    r"subcategory|split|model|models|generator|language|lang|locale|created|updated|at|time|timestamp|date|type|task|"
    r"tasks|topic|domain|tag|tags|difficulty|license|licence|author|annotator|worker|name|version|url|link|file|path|"
    r"quality|score|scores|rating|ratings|margin|label|judge|status|notes?|comments?|metadata|meta)",
    re.IGNORECASE,
)
_ASKER = r"(?:human|user|question|q|instruction|prompt)"
_ANSWERER = r"(?:assistant|ai|a|answer|response|bot|gpt|model|output)"
# A text that begins as a dialogue.
_TRANSCRIPT = re.compile(rf"\s*(?:{_ASKER}\s*:|#{{2,}}\s*{_ASKER}\b|<\|\w+\|>|\[INST\]|<start_of_turn>)", re.IGNORECASE)
# Marks of a dialogue anywhere in a text.
_DIALOGUE = re.compile(
    rf"(?:^|\n)\s*(?:(?:human|user)\s*:|#{{2,}}\s*{_ASKER}\b)|<\|\w+\|>|\[/?INST\]|<start_of_turn>"
    rf"|\S[^\n]*\n\s*{_ANSWERER}\s*:\s*$",
    re.IGNORECASE,
)


def extract_prompt(chosen: Answer, rejected: Answer) -> tuple[Answer, Answer, Answer]:
    """(prompt, chosen, rejected): the shared start, and the two answers without it, neither of them empty.

    As in TRL's function of this name, a space at the end of a shared text stays with the answers.
    """
    last = min(len(chosen), len(rejected)) - 1
    start = next((index for index in range(last + 1) if chosen[index] != rejected[index]), None)
    if start is None:
        start = last
    elif start and chosen[start - 1] == " ":
        start -= 1
    return chosen[:start], chosen[start:], rejected[start:]


def holds_question(shared: Answer, questions: Sequence[str]) -> bool:
    """Whether two answers begin with their prompt, so that the question beside them is a repetition.

    Args:
        shared: what the answers begin with.
        questions: the question's words, in one piece or several.
    """
    if isinstance(shared, list):
        return any(message["role"] == "user" for message in shared if "role" in message)
    words = [_plain(question) for question in questions if _plain(question)]
    inside = all(word in _plain(shared) for word in words)
    return bool(shared and words) and bool(_TRANSCRIPT.match(shared) or (inside and len(shared.split()) > 1))


def shared_text_faults(shared: str, row: Mapping[str, Any], sides: Sequence[str]) -> list[str]:
    """A fault if the text that two answers begin with cannot be taken for their prompt.

    A dialogue is a prompt. Any other text is one only if nothing else in the row could be the question, and if it is a
    line or at least a word: two answers often begin with the same letters.
    """
    if _DIALOGUE.search(shared) or _TRANSCRIPT.match(shared):
        return []
    others = [key for key, value in row.items() if key not in sides and _may_ask(key, value, shared)]
    if not others and (not shared or "\n" in shared or len(shared.split()) > 1 or _ends_word(shared, row)):
        return []
    beside = f" and {', '.join(others)} beside them" if others else ""
    return [
        f"found no prompt, but {shared!r} that chosen and rejected begin with{beside}, expected the question under "
        '"prompt", "question" or "instruction" ("prompt": "" where there is none)'
    ]


def without_prompt(prompt: Answer, chosen: Answer, rejected: Answer) -> tuple[Answer, Answer, Answer]:
    """(prompt, chosen, rejected), with the prompt, or its end, removed from the answers if both begin with it.

    A system text that both answers begin with goes to the front of the prompt. All three are text or all are messages.
    """
    shared = extract_prompt(chosen, rejected)[0]
    if isinstance(prompt, str):
        if _TRANSCRIPT.match(shared) and _plain(prompt) and _plain(prompt) in _plain(shared):
            return extract_prompt(chosen, rejected)
        # Both answers may well begin with the same single word.
        repeated = len(prompt.split()) > 1 and shared.startswith(prompt)
        return (prompt, chosen[len(prompt) :], rejected[len(prompt) :]) if repeated else (prompt, chosen, rejected)
    head = list(itertools.takewhile(lambda message: message["role"] in _SYSTEM_ROLES, shared))
    if head and prompt and prompt[0]["role"] not in _SYSTEM_ROLES:
        prompt = [*head, *prompt]
    ends = [prompt[start:] for start in range(len(prompt)) if prompt[start]["role"] in ("user", *_SYSTEM_ROLES)]
    found = next((end for end in (*ends, head) if end and shared[: len(end)] == end), [])
    if found is head and prompt[: len(head)] != head:
        found = []
    return prompt, chosen[len(found) :], rejected[len(found) :]


def with_question(question: list[Message], chosen: list, rejected: list) -> tuple[list, list, list]:
    """(prompt, chosen, rejected) of two conversations; the question joins their shared start if it has none."""
    shared, chosen, rejected = extract_prompt(chosen, rejected)
    if any(message["role"] == "user" for message in shared):
        return shared, chosen, rejected
    head = list(itertools.takewhile(lambda message: message["role"] in _SYSTEM_ROLES, shared))
    return [*head, *question, *shared[len(head) :]], chosen, rejected


def _may_ask(key: str, value: Any, shared: str) -> bool:
    if not isinstance(value, str) or " " not in value.strip() or _ABOUT_THE_ROW.fullmatch(key):
        return False
    return _plain(value) not in _plain(shared)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _ends_word(shared: str, row: Mapping[str, Any]) -> bool:
    return all(not row[side][len(shared) :][:1].isalnum() for side in ("chosen", "rejected"))
