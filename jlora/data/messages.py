"""Messages in other tools' forms, brought into one: role, content as text, tool_calls, and "train": False."""

import json
import math
from collections.abc import Iterator
from typing import Any

from jlora.data.files import parse_json
from jlora.errors import UserError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# The roles' names in ShareGPT, OpenAI's older format and Gemini.
_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_SPEAKERS = {role: role for role in ROLES} | _ROLE_NAMES
_SPEAKERS |= dict.fromkeys(("bot", "chatgpt", "function_call", "tool_call"), "assistant") | {
    "function_response": "tool"
}
_CALLS = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Keys that say whether a turn is trained: true or 1 for yes, false or 0 for no; "masked" is the other way round.
_TRAINED = (
    "weight",
    "loss_weight",
    "loss_scale",
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "loss",
    "loss_mask",
)
_MASKED = "masked"
# Keys that choose parts of a turn, which cannot be trained separately.
_PARTS_OF_TURN = ("train_detail", "mask")


def normal_messages(field: str, messages: Any, *, learned: bool = True) -> tuple[Any, list[str], list[str]]:
    """(messages in the normal form, their faults, notes on what is not used in them).

    A message may use "from" and "value", a list of text parts as its content, or "function_call"; an assistant's may
    say under several keys that it is not trained, which becomes "train": False. Anything that is not a list of objects
    is returned as it is, for `message_faults`.

    Args:
        learned: whether assistants' messages may be trained here; if not, how they are marked is not checked.
    """
    if not isinstance(messages, list):
        return messages, [], []
    normal, faults, unused = [], [], []
    for index, message in enumerate(messages):
        if isinstance(message, dict):
            where = f"{field}[{index}]"
            try:
                message = _with_text(where, _with_calls(where, _with_role(where, message)))
                message, untrained = _with_train(where, message, learned)
                unused += untrained
                faults += finite_faults(f"{where}.tool_calls", message.get("tool_calls"))
            except UserError as error:
                faults.append(str(error))
        normal.append(message)
    return normal, faults, unused


def message_faults(field: str, messages: Any) -> list[str]:
    """The faults of a list of messages."""
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else kind_of(messages)
        return [f"{field}: found {found}, expected a list of messages"]
    faults = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            faults.append(f'{where}: found {kind_of(message)}, expected an object with "role" and "content"')
            continue
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            faults.append(f"{where}.role: found {role!r}, expected one of {', '.join(ROLES)}")
        if role == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            found = kind_of(content) if "content" in message else "no such field"
            faults.append(f"{where}.content: found {found}, expected text")
        elif role == "assistant" and not content:
            faults.append(f"{where}.content: found empty text, expected what the assistant says")
    return faults


def side_faults(field: str, value: Any) -> list[str]:
    """The faults of a prompt or an answer, which must be text or a list of messages."""
    if isinstance(value, str):
        return []
    if isinstance(value, list):
        return message_faults(field, value)
    return [f"{field}: found {kind_of(value)}, expected text or a list of messages"]


def completion_faults(field: str, value: Any) -> list[str]:
    """The faults of an answer: `side_faults`, or that there is nothing in it to learn."""
    faults = side_faults(field, value)
    if faults:
        return faults
    if isinstance(value, str):
        return [] if value else [f"{field}: found empty text, expected the text to learn"]
    if not any(message["role"] == "assistant" for message in value):
        return [f"{field}: found no assistant message, expected at least one"]
    return []


def finite_faults(field: str, value: Any) -> list[str]:
    """A fault if a number is not finite: only Python's JSON has NaN and Infinity, and templates do not write them."""
    if any(isinstance(number, float) and not math.isfinite(number) for number in _leaves(value)):
        return [f"{field}: found NaN or Infinity, expected numbers that JSON has"]
    return []


def kind_of(value: Any) -> str:
    """A value's JSON type in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    names |= dict.fromkeys((int, float), "a number")
    return names.get(type(value), f"a value of the type {type(value).__name__}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _with_role(where: str, message: Message) -> Message:
    """The message with "from" and "value" as "role" and "content", and with jlora's names for the roles."""
    if "role" not in message and "from" in message:
        speaker = message["from"]
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise UserError(f"{where}.from: found {speaker!r}, expected one of {', '.join(_SPEAKERS)}")
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": _SPEAKERS[speaker]} | ({"content": message["value"]} if "value" in message else {}) | rest
        return _as_call(where, message) if speaker in _CALLS else message
    role = message.get("role")
    return {**message, "role": _ROLE_NAMES[role]} if isinstance(role, str) and role in _ROLE_NAMES else message


def _as_call(where: str, message: Message) -> Message:
    """ShareGPT's message of a call, whose content is the call as JSON (or several, as a list), with "tool_calls"."""
    calls = message.get("content")
    if isinstance(calls, str):
        try:
            calls = parse_json(calls, "a call as JSON with name and arguments")
        except UserError as error:
            raise UserError(f"{where}.value: {error}") from error
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f"{where}.value: found {kind_of(calls)}, expected a call as JSON with name and arguments")
    return {**message, "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _with_calls(where: str, message: Message) -> Message:
    """The message with OpenAI's older "function_call" as "tool_calls"."""
    if "function_call" not in message:
        return message
    call = message["function_call"]
    rest = {key: value for key, value in message.items() if key != "function_call"}
    # In tables, a message without a call has an object of nulls, or an empty one.
    nothing = not call or (isinstance(call, dict) and all(value is None for value in call.values()))
    if nothing or message.get("tool_calls"):
        return rest
    if not isinstance(call, dict) or "name" not in call:
        raise UserError(f"{where}.function_call: found {kind_of(call)}, expected an object with name and arguments")
    content = rest.get("content") or ""
    return {**rest, "content": content, "tool_calls": [{"type": "function", "function": call}]}


def _with_text(where: str, message: Message) -> Message:
    """The message with a content that is a list of text parts joined to one text."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in _TEXT_PARTS:
            raise UserError(
                f"{where}.content[{index}]: found a part of type {kind!r}, expected text parts only: jlora "
                "trains models on text"
            )
        if not isinstance(text, str):
            raise UserError(f"{where}.content[{index}].text: found {kind_of(text)}, expected text")
        texts.append(text)
    return {**message, "content": "".join(texts)}


def _with_train(where: str, message: Message, learned: bool) -> tuple[Message, list[str]]:
    """The message with "train": False as the only key on whether it is trained, and notes on others not used."""
    said = [key for key in (*_TRAINED, _MASKED, *_PARTS_OF_TURN) if key in message]
    if not said:
        return message, []
    rest = {key: value for key, value in message.items() if key not in said}
    answers = rest.get("role") == "assistant"
    whose = "in a prompt, which is" if answers else f"with messages of the {rest.get('role')}, which are"
    found, unused = {}, []
    for key in said:
        if (value := message[key]) is None or (key in _PARTS_OF_TURN and value in ([], "", False, 0)):
            continue
        if key in _PARTS_OF_TURN or not isinstance(value, int | float) or value not in (0, 1):
            if not (answers and learned):
                unused.append(f"{key}: not used {whose} never trained")
                continue
            raise UserError(
                f"{where}.{key}: found {json.dumps(value, default=str)[:40]}, expected true or false (or 1 or 0): a "
                "turn is trained as a whole or not at all"
            )
        found[key] = bool(value) != (key == _MASKED)
    if len(set(found.values())) > 1 and answers and learned:
        raise UserError(f"{where}: found {' and '.join(found)}, which say different things about training this turn")
    trained = next(iter(found.values()), True)
    if answers:
        return rest if trained else {**rest, "train": False}, unused
    unused += [f"{key}: not used {whose} never trained" for key in found if trained]
    return rest, unused
