"""Arguments with one value for each prompt: a single prompt does not need a list around it."""

from collections.abc import Mapping, Sequence
from typing import Any

from jlora.data import Prompt
from jlora.errors import UserError, describe_faults, number_of
from jlora.lora.bank import Choice

EXPECTED = "expected a text, or a list of chat messages with role and content"


def as_prompts(prompts: Any) -> list[Prompt]:
    """The prompts as a list; a single text or chat becomes a list of one.

    Raises:
        UserError: some prompts are neither texts nor chats; all of them are listed.
    """
    alone = isinstance(prompts, str) or (_is_list(prompts) and len(prompts) > 0 and all(map(_is_message, prompts)))
    found = [prompts] if alone else list(prompts) if _is_list(prompts) else None
    if found is None:
        raise UserError(f"prompts: found {_described(prompts)}, {EXPECTED}, or a list of those")
    faults = [
        f"prompt {number}: found {_described(prompt)}, {EXPECTED}"
        for number, prompt in enumerate(found)
        if not (isinstance(prompt, str) or (_is_list(prompt) and all(map(_is_message, prompt))))
    ]
    if faults:
        raise UserError(describe_faults(f"{len(faults)} of {number_of(len(found), 'prompt')} cannot be used", faults))
    return found


def one_each(name: str, given: Any, single: type | tuple[type, ...], count: int) -> list[Any]:
    """One value for each of `count` prompts; for one prompt the value may be given without a list.

    Args:
        name: the argument's name, for the error message.
        single: the type or types of one value.

    Raises:
        UserError: there are not as many values as prompts.
    """
    found = [given] if isinstance(given, single) else list(given)
    if len(found) != count:
        alone = " (without a list around it)" if isinstance(given, single) else ""
        raise UserError(f"{name}: found {len(found)}{alone}, expected one for each of {number_of(count, 'prompt')}")
    return found


def choices(adapters: Choice | Sequence[Choice] | None, count: int) -> list[Choice]:
    """Each prompt's choice from a bank; None is the base alone."""
    return [None] * count if adapters is None else one_each("adapters", adapters, (str, Mapping), count)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value)) or 'nothing'}"
    return f"a list with {_described(value[0])}" if _is_list(value) and len(value) else f"{type(value).__name__}"
