"""Rows in their various forms: which keys hold the chat, the question, the answer, the system text and the tools.

The names are those of Alpaca, ShareGPT, Orca, OpenAI, TRL, axolotl, LLaMA-Factory, Unsloth, mlx-lm and torchtune. A key
that has a meaning in one of them but no place in a record is reported as unused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jlora.data.files import parse_json
from jlora.data.messages import Message, finite_faults, kind_of, message_faults, normal_messages
from jlora.errors import UserError

Record = dict[str, Any]

TEMPLATE_FIELDS = {"tools": list, "chat_template_kwargs": dict}
# The fields that can hold messages.
SIDES = ("prompt", "completion", "chosen", "rejected")
_CHATS = ("conversations", "conversation")
_QUESTIONS = ("instruction", "question", "query")
# The second part of a question in Alpaca and Dolly, which goes with an instruction.
_CONTEXTS = ("input", "context")
_ANSWERS = ("output", "response", "answer")
_SYSTEMS = ("system", "system_prompt")
_MEDIA = ("images", "videos", "audios", "image", "video", "audio")

# Locations of pictures and sounds, and the marks for them in a chat.
_MEDIA_PLACE = re.compile(
    r"(?:https?|s3|gs|file)://|data:\w+/|\S\.(?:png|jpe?g|gif|webp|bmp|tiff?|svg|mp[34]|m4a|wav|flac|"
    r"ogg|opus|webm|mkv|avi|mov)\b",
    re.IGNORECASE,
)
_MEDIA_MARK = re.compile(r"<\|?(?:image|video|audio)(?:_pad|_\d+)?\|?>")

_OTHER_PROMPT = "the prompt is read from {read}"
_OTHER_ANSWER = "the answer is read from {answers}"
_ONE_WEIGHT = "every record counts the same"
# Keys that other loaders read and that have no place of their own in a record, and why.
_UNUSED = (
    dict.fromkeys((*_CHATS, *_QUESTIONS, "input", "history", "prompt"), _OTHER_PROMPT)
    | dict.fromkeys(("output", "response", "completion"), _OTHER_ANSWER)
    | dict.fromkeys(("chosen", "rejected", "completions", "scores"), "preferences are for algorithms that learn them")
    | dict.fromkeys(("label", "kto_tag"), 'every answer is learned, wanted or not (algorithm="kto" tells them apart)')
    | dict.fromkeys(("weight", "sample_weight", "loss_weight", "loss_mask", "loss", "train"), _ONE_WEIGHT)
    | dict.fromkeys(("tool_choice", "function_call", "parallel_tool_calls"), "the chat template is not given it")
    | dict.fromkeys(("thinking", "reasoning", "reasoning_content"), "reasoning belongs in the answer's message")
    | {"functions": "a chat's tools are read from tools"}
)
# Keys for which true and 1 mean the same as leaving them out.
_SAYS_YES = ("label", "kto_tag", "weight", "sample_weight", "loss_weight", "loss_mask", "loss", "train")


def normal_row(
    row: Record, fields: Sequence[str], *, chat: bool = True, learned: bool = True
) -> tuple[Record, list[str], list[str]]:
    """(the row with its messages in the normal form and its tools as a list, its faults, notes on what is not used).

    A chat under "conversations" is renamed to "messages". All other keys stay as they are.

    Args:
        fields: what the caller reads besides messages; fields that it does not read are not checked.
        chat: whether the caller reads messages.
        learned: whether the caller trains on answers.
    """
    row, faults = with_template_fields(row)
    unused: list[str] = []

    def normal(field: str, side: Any, read: bool = True) -> Any:
        nonlocal faults, unused
        found, wrong, idle = normal_messages(field, _as_list(side), learned=learned and field != "prompt")
        if not read:
            return side if wrong else found
        faults, unused = faults + wrong, unused + idle
        return found

    name = _chat_name(row, fields) if chat else None
    if name is not None:
        row["messages"] = normal(name, _as_turns(row.pop(name)))
        faults += [] if name == "messages" else message_faults(name, row["messages"])
    # Readers of preferences, which are those that read completions, read the sides beside a chat too.
    for field in SIDES:
        if field in row:
            row[field] = normal(field, row[field], field in fields and (name is None or "completions" in fields))
    if isinstance(row.get("completions"), list) and "completions" in fields:
        row["completions"] = [normal(f"completions[{i}]", one) for i, one in enumerate(row["completions"])]
    functions = row.get("functions")
    if functions and isinstance(functions, list) and not row.get("tools") and _has_calls(row):
        row["tools"] = [{"type": "function", "function": function} for function in functions]
    return row, faults, unused


def _chat_name(row: Record, fields: Sequence[str]) -> str | None:
    """The key of the row's chat; None without one, or if the row has all that the caller reads without it."""
    if "messages" in row:
        return "messages"
    whole = "prompt" in row and all(field in row for field in ("completion",) if field in fields)
    for name in _CHATS:
        turns = row.get(name)
        if isinstance(turns, list) and turns and not whole:
            if any(isinstance(turn, dict) for turn in turns) or not (asks(row) or "prompt" in row):
                return name
    return None


def _as_turns(chat: Any) -> Any:
    """As messages, a chat whose turns are pairs of the user's words ("input") and the answer ("output")."""
    pairs = chat if isinstance(chat, list) else []
    if not pairs or not all(isinstance(pair, dict) and {"input", "output"} <= set(pair) for pair in pairs):
        return chat
    if any({"role", "from"} & set(pair) for pair in pairs):
        return chat
    turns = (("user", "input"), ("assistant", "output"))
    return [{"role": role, "content": pair[key]} for pair in pairs for role, key in turns]


def with_template_fields(row: Record) -> tuple[Record, list[str]]:
    """A copy of the row with its tools as a list and without empty fields for the chat template; and its faults."""
    faults = []
    row = {key: value for key, value in row.items() if value is not None or key not in TEMPLATE_FIELDS}
    if isinstance(row.get("tools"), str):
        try:
            row["tools"] = parse_json(row["tools"], "a list of tools as JSON") if row["tools"].strip() else None
        except UserError as error:
            faults.append(f"tools: {error}")
            row["tools"] = None
    if row.get("tools", ...) in (None, []):
        del row["tools"]
    for name, expected in TEMPLATE_FIELDS.items():
        if not isinstance(row.get(name, expected()), expected):
            faults.append(f"{name}: found {kind_of(row[name])}, expected {kind_of(expected())}")
        faults += finite_faults(name, row.get(name))
    return row, faults


def asks(row: Mapping[str, Any]) -> bool:
    """Whether a row has a question under a name other than "messages" or "prompt"."""
    return any(_has_text(row, key) for key in (*_QUESTIONS, "input"))


def questions(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row's question, under whatever keys."""
    if isinstance(row.get("messages"), list):
        asked = [one for one in row["messages"] if isinstance(one, dict) and one.get("role") == "user"]
        return [one["content"] for one in asked[-1:] if isinstance(one.get("content"), str)]
    return [row[key] for key in (*_QUESTIONS, *_CONTEXTS) if _has_text(row, key)] if asks(row) else []


def question(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row's question: those of its history, then the user's.

    An instruction and its input become one message, with a blank line between them.

    Raises:
        UserError: the row has no question, or more than one way to read it.
    """
    asked = [key for key in _QUESTIONS if _has_text(row, key)] or [key for key in ("input",) if _has_text(row, key)]
    if len(asked) != 1:
        raise UserError(f"found {' and '.join(asked) or 'no question'}, expected one of {', '.join(_QUESTIONS)}")
    [name] = asked
    parts = [key for key in _CONTEXTS if key != name and _has_text(row, key)]
    if len(parts) > 1 or (parts and name != "instruction"):
        raise UserError(
            f"found {' and '.join([name, *parts])}, expected a question in one piece, or instruction and input: "
            'write them as one, or as "messages"'
        )
    words = "\n\n".join(row[key] for key in (name, *parts))
    return [*_history(row.get("history")), {"role": "user", "content": words}]


def question_keys(row: Mapping[str, Any]) -> list[str]:
    """The keys under which a row has its question and its answer."""
    return [key for key in (*_QUESTIONS, *_CONTEXTS, *_ANSWERS, "history") if row.get(key)]


def answer(row: Mapping[str, Any]) -> str | None:
    """The answer beside a question; None without one."""
    return next((row[key] for key in _ANSWERS if _has_text(row, key)), None)


def as_chat(row: Record) -> Record:
    """The row with "messages" made of its question and answer.

    Raises:
        UserError: as in `question`, or the row has no answer.
    """
    if (words := answer(row)) is None:
        found = [key for key in _ANSWERS if key in row]
        if not found:
            raise UserError(f"found a question without an answer, expected one of {', '.join(_ANSWERS)}")
        kind = "empty text" if isinstance(row[found[0]], str) else kind_of(row[found[0]])
        raise UserError(f"{found[0]}: found {kind}, expected the text to learn")
    return {**row, "messages": [*question(row), {"role": "assistant", "content": words}]}


def with_system(row: Record, field: str) -> tuple[Record, list[str], list[str]]:
    """(the row with its system text as the first message of `field`, its faults, notes on what is not used)."""
    key = next((key for key in _SYSTEMS if _has_text(row, key)), None)
    if key is None:
        return row, [], []
    words, chat = row[key], row[field]
    if isinstance(chat, str):
        if re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", chat):
            return row, [], []
        return row, [f'{key}: found it beside plain text, expected "{field}" as messages, or with this text in it'], []
    if chat and chat[0]["role"] in ("system", "developer"):
        same = re.match(rf"\s*{re.escape(words.strip())}(?!\w)", chat[0].get("content") or "")
        return row, [], [] if same else [f"{key}: not used: the chat has a system message of its own"]
    return {**row, field: [{"role": "system", "content": words}, *chat]}, [], []


def media_faults(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(a fault for each key that holds pictures or sounds, which no model here sees; a note for each that may not).

    A text counts as one if it is the location of a file, or if the chat has a mark for it.
    """
    faults, notes = [], []
    for key in _MEDIA:
        value = row.get(key)
        if not value or isinstance(value, int | float):
            continue
        items = value if isinstance(value, list) else [value]
        texts = [item for item in items if isinstance(item, str | int | float | None)]
        marked = any(_MEDIA_MARK.search(text) for text in _words(row, ("messages", *SIDES)))
        if (
            len(texts) < len(items)
            or marked
            or any(_MEDIA_PLACE.search(text) for text in texts if isinstance(text, str))
        ):
            faults.append(
                f"{key}: found it beside the text, expected text only: jlora trains models on text, and the "
                "answer may depend on what they are not shown"
            )
        else:
            notes.append(f"{key}: not used: jlora trains models on text")
    return faults, notes


def unused_keys(
    row: Mapping[str, Any], read: Sequence[str], among: Sequence[str] = tuple(_UNUSED), *, answers: str | None = None
) -> list[str]:
    """Notes on keys that another loader would read here and that this record does not use.

    A key whose words are in the chat anyway, such as a copy of its question, is not reported.

    Args:
        read: the keys that the record is made of.
        among: the keys to look at.
        answers: where the answer is read from; default: the first of `read`.
    """
    texts = None
    found = []
    for key in among:
        if key == "history" and key in read and _has_text(row, key):
            found.append("history: not used: found text, expected a list of [question, answer]")
        if key not in row or key in read or _says_nothing(key, row[key]) or (key == "functions" and row.get("tools")):
            continue
        if words := _telling_words(row[key]):
            texts = list(_words(row, read)) if texts is None else texts
            if all(any(word in text for text in texts) for word in words):
                continue
        found.append(f"{key}: not used: {_UNUSED[key].format(read=read[0], answers=answers or read[0])}")
    return found


def unused_template_fields(row: Mapping[str, Any]) -> list[str]:
    """Notes on fields for the chat template in a row of plain text."""
    return [
        f"{name}: not used: it is for the chat template, which plain text does not go through"
        for name in TEMPLATE_FIELDS
        if row.get(name)
    ]


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a value means the same as leaving out its key."""
    if key in _SAYS_YES:
        return value is None or (isinstance(value, int | float) and value == 1) or value in ("", [], {})
    return not value or isinstance(value, int | float)


def _telling_words(value: Any) -> list[str]:
    """What to look for in a chat that may repeat the value: a text, the texts of messages, the names of functions."""
    if isinstance(value, str):
        return [value]
    items = value if isinstance(value, list) else []
    words = [item.get("content", item.get("name")) if isinstance(item, dict) else None for item in items]
    return words if all(isinstance(word, str) and word for word in words) else []


def _as_list(side: Any) -> Any:
    """A list of the one message as which LLaMA-Factory writes an answer; anything else as it is."""
    return [side] if isinstance(side, dict) and {"role", "from"} & set(side) else side


def _has_text(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), str) and bool(row[key].strip())


def _has_calls(row: Mapping[str, Any]) -> bool:
    sides = [row[field] for field in ("messages", *SIDES) if isinstance(row.get(field), list)]
    return any(isinstance(message, dict) and message.get("tool_calls") for side in sides for message in side)


def _words(row: Mapping[str, Any], read: Sequence[str]) -> Iterator[str]:
    for side in (row.get(field) for field in read):
        if isinstance(side, str):
            yield side
        elif isinstance(side, list):
            contents = (message.get("content") for message in side if isinstance(message, dict))
            yield from (content for content in contents if isinstance(content, str))


def _history(turns: Any) -> list[Message]:
    """The messages of earlier turns, each [question, answer]."""
    if not turns or isinstance(turns, str):
        return []
    pairs = turns if isinstance(turns, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in pairs):
        raise UserError(f"history: found {kind_of(turns)}, expected a list of [question, answer], both text")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
