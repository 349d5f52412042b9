"""OpenAI's requests and answers: bodies are checked, and answers are put into the form that its clients parse."""

import dataclasses
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jlora.data.messages import kind_of, message_faults, normal_messages
from jlora.errors import UserError, describe_faults, first_few
from jlora.families.kinds import short
from jlora.serve.calls import Call, Reader
from jlora.serve.forms import names_of
from jlora.serve.request import Piece, Sampling, Token, Usage

MOST_CHOICES, MOST_STOPS = 16, 16
LEAST = -9999.0  # the log-probability of a token that is never drawn
# Fields that change nothing here, and that clients send.
IGNORED = (
    *("user", "store", "metadata", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"),
    "prompt_cache_retention",
)
# Fields of the API that are not supported → the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": (None, {}),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
}


class Refused(UserError):
    """A request that gets an error for an answer.

    Attributes:
        status: of HTTP.
        code: OpenAI's word for it.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else None
        kind = kind or "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        chat: whether the answer is a chat's.
        prompts: texts, lists of tokens, or one list of messages.
        max_new_tokens: None if the body does not say.
        variables: what the chat template is given besides the messages.
        tools: those that may be called: none with tool_choice="none", and the one that it names.
        calls: whether the answer has to be a call.
        top: as in `jlora.serve.Request`.
    """

    chat: bool
    model: str
    prompts: list[Any]
    sampling: Sampling
    seed: int | None
    choices: int
    max_new_tokens: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignore_end: bool
    top: int | None
    stream: bool
    tells_usage: bool
    variables: Mapping[str, Any]
    tools: tuple[Mapping[str, Any], ...]
    calls: bool


def parse(body: bytes, *, chat: bool) -> Asked:
    """What the body of a request asks for.

    Raises:
        Refused: it is not JSON, or not what the API takes; all faults are listed.
    """
    fields = {name: value for name, value in parse_object(body).items() if value is not None}
    faults = [
        *(f"{name}: found {short(fields[name])}, which is not supported" for name in NEUTRAL if _asks(fields, name)),
        *_misshapen(fields, {**SHARED, **(CHAT if chat else COMPLETION)}),
    ]
    known = {*SHARED, *(CHAT if chat else COMPLETION), *IGNORED, *NEUTRAL}
    if unknown := [name[:60] for name in fields if name not in known]:
        faults.append(f"{first_few(unknown, 8)}: unknown; the fields are {', '.join(sorted(known))}")
    prompt = "messages" if chat else "prompt"
    faults += [f"{name}: missing" for name in ("model", prompt) if name not in fields]
    if faults:
        raise Refused(400, describe_faults("the request cannot be read", faults))
    stop, choice = fields.get("stop", []), fields.get("tool_choice", "auto")
    return Asked(
        chat=chat,
        model=fields["model"],
        prompts=[_messages(fields["messages"])] if chat else _prompts(fields["prompt"]),
        sampling=Sampling(**{name: fields[name] for name in SAMPLING if name in fields} | {"top_k": _top_k(fields)}),
        seed=fields.get("seed"),
        choices=fields.get("n", 1),
        max_new_tokens=fields.get("max_completion_tokens", fields.get("max_tokens")),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=tuple(fields.get("stop_token_ids", ())),
        ignore_end=fields.get("ignore_eos", False),
        top=_top(fields, chat),
        stream=fields.get("stream", False),
        tells_usage=fields.get("stream_options", {}).get("include_usage", False),
        variables=({"tools": fields["tools"]} if fields.get("tools") else {}) | fields.get("chat_template_kwargs", {}),
        tools=_callable(fields.get("tools", ()), choice),
        calls=choice not in ("auto", "none"),
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
        Refused: there is none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(400, f"found {kind_of(found)}, expected an object")
    return found


def is_whole(value: Any, least: int = -(1 << 63), most: int = (1 << 63) - 1) -> bool:
    """Whether the value is a whole number in this range."""
    return type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6


def _list_of(is_one: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(is_one, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_prompt(value: Any) -> bool:
    tokens = _list_of(is_whole, 1 << 24)
    some = isinstance(value, list) and len(value) > 0
    return _is_text(value) or (some and (all(map(_is_text, value)) or tokens(value) or all(map(tokens, value))))


SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
Shape = tuple[str, Callable[[Any], bool]]
TRUTH: Shape = ("true or false", lambda value: type(value) is bool)
OBJECT: Shape = ("an object", lambda value: isinstance(value, dict))
WHOLE: Shape = ("a whole number", is_whole)
# Field → what it must be. Ranges of numbers are checked where all requests are (`jlora.serve.Request`).
SHARED: dict[str, Shape] = {
    **dict.fromkeys(SAMPLING, ("a number", _number)),
    "model": ("text", _is_text),
    "top_k": ("a whole number", lambda value: is_whole(value, -1, 1 << 30)),
    "max_tokens": ("a whole number of at least 1", lambda value: is_whole(value, 1)),
    "n": (f"1 to {MOST_CHOICES}", lambda value: is_whole(value, 1, MOST_CHOICES)),
    "seed": WHOLE,
    "stop": (
        f"text, or a list of at most {MOST_STOPS}",
        lambda value: _is_text(value) or _list_of(_is_text, MOST_STOPS)(value),
    ),
    "stop_token_ids": ("a list of token ids", _list_of(is_whole, 1 << 10)),
    "ignore_eos": TRUTH,
    "stream": TRUTH,
    "stream_options": ("an object with include_usage", lambda value: _is_stream_options(value)),
}
CHAT: dict[str, Shape] = {
    "messages": ("a list of messages", lambda value: isinstance(value, list)),
    "max_completion_tokens": SHARED["max_tokens"],
    "logprobs": TRUTH,
    "top_logprobs": WHOLE,
    "tools": ("a list of objects", _list_of(lambda value: isinstance(value, dict), 1 << 10)),
    "tool_choice": (
        '"auto", "none", "required" or {"type": "function", "function": {"name": NAME}}',
        lambda value: value in ("auto", "none", "required") or _is_function(value),
    ),
    "chat_template_kwargs": OBJECT,
}
COMPLETION: dict[str, Shape] = {"prompt": ("text or token ids, or a list of those", _is_prompt), "logprobs": WHOLE}


def _is_stream_options(value: Any) -> bool:
    names = ("include_usage", "include_obfuscation")
    return isinstance(value, dict) and all(name in names and type(is_on) is bool for name, is_on in value.items())


def _is_function(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    return isinstance(function, dict) and _is_text(function.get("name"))


def _misshapen(fields: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[str]:
    return [
        f"{name}: found {_shown(fields[name])}, expected {expected}"
        for name, (expected, fits) in shapes.items()
        if name in fields and not fits(fields[name])
    ]


def _shown(value: Any) -> str:
    return kind_of(value) if isinstance(value, dict | list) or len(str(value)) > 40 else json.dumps(value)


def _asks(fields: Mapping[str, Any], name: str) -> bool:
    return name in fields and fields[name] not in NEUTRAL[name]


def _callable(tools: Sequence[Mapping[str, Any]], choice: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools that may be called.

    Raises:
        Refused: one has to be, and there is none, or none of that name.
    """
    if choice == "none":
        return ()
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        tools = [tool for tool in tools if names_of([tool]) == {name}]
        if not tools:
            raise Refused(400, f"tool_choice: found {short(name)}, expected the name of one of the tools")
    if choice != "auto" and not names_of(tools):
        raise Refused(400, f"tool_choice: found {short(choice)}, expected tools with it")
    return tuple(tools)


def _messages(found: list[Any]) -> list[dict[str, Any]]:
    messages, faults, _ = normal_messages("messages", found, learned=False)
    if faults := faults or message_faults("messages", messages):
        raise Refused(400, describe_faults("the messages cannot be used", faults))
    return [_with_names_first(message) for message in messages]


def _with_names_first(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls as models write them: OpenAI's client sends back arguments before names."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_with_name_first(call) for call in calls]}


def _with_name_first(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        return call
    return call | {"function": {"name": function["name"], **function}}


def _prompts(found: Any) -> list[Any]:
    return [found] if isinstance(found, str) or type(found[0]) is int else found


def _top_k(fields: Mapping[str, Any]) -> int:
    """0 for all tokens, as here, or -1, as elsewhere."""
    return max(0, fields.get("top_k", 0))


def _top(fields: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return fields.get("logprobs")
    if "top_logprobs" in fields and not fields.get("logprobs"):
        raise Refused(400, "top_logprobs: expected logprobs=true with it")
    return fields.get("top_logprobs", 0) if fields.get("logprobs") else None


# ---------------------------------------------------------------- answers


class Answer:
    """The answer to a request, whole or in the chunks of a stream.

    Args:
        word: a token's text.
        reader: makes what finds the calls of one choice, if the request has tools.
    """

    def __init__(self, asked: Asked, word: Callable[[int], str], reader: Callable[[], Reader] | None = None) -> None:
        self._asked, self._word = asked, word
        self._head = {
            "id": ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": asked.model,
        }
        self._written: defaultdict[int, int] = defaultdict(int)
        self._called: defaultdict[int, int] = defaultdict(int)
        self._readers = defaultdict(reader) if reader else None

    def whole(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The whole answer, from the pieces of all choices."""
        choices = [self._choice(index, pieces) for index, pieces in enumerate(answers)]
        ends = [pieces[-1].usage for pieces in answers]
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(ends)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's choice."""
        content = "" if self._readers is None else None  # it stays null if nothing but calls follows
        return self._chunk(index, {"delta": {"role": "assistant", "content": content}, "finish_reason": None})

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunks that a choice's piece becomes; none if there is nothing to tell yet."""
        bodies = self._deltas(index, piece) if self._asked.chat else [{"text": piece.text}] if piece.text else []
        if not bodies and (piece.finish or self._asked.top is not None):
            bodies = [{"delta": {}} if self._asked.chat else {"text": ""}]
        told = self._told([piece], self._written[index])
        self._written[index] += len(piece.text)
        for number, body in enumerate(bodies, 1):
            finish = self._finish(index, piece) if number == len(bodies) else None
            yield self._chunk(index, {**body, "finish_reason": finish, "logprobs": told})
            told = None

    def last(self, ends: Sequence[Usage | None]) -> dict[str, Any]:
        """The chunk after all others, which tells the usage."""
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        return {**self._head, "object": kind, "choices": [], "usage": self._usage(ends)}

    def _chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        usage = {"usage": None} if self._asked.tells_usage else {}
        return {**self._head, "object": kind, "choices": [{"index": index, **choice}], **usage}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        told = self._told(pieces)
        text = "".join(piece.text for piece in pieces)
        if self._asked.chat:
            text, calls = self._read(index, text, is_last=True)
            message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            body = {"message": message | ({"tool_calls": calls} if calls else {})}
        else:
            body = {"text": text}
        return {"index": index, **body, "finish_reason": self._finish(index, pieces[-1]), "logprobs": told}

    def _deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        text, calls = self._read(index, piece.text, is_last=piece.finish is not None)
        numbered = [{"index": place, **call} for place, call in enumerate(calls, self._called[index] - len(calls))]
        deltas = ([{"content": text}] if text else []) + ([{"tool_calls": numbered}] if numbered else [])
        return [{"delta": delta} for delta in deltas]

    def _read(self, index: int, text: str, *, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """What of a choice's new text is to be told as text, and as calls."""
        if self._readers is None:
            return text, []
        reader = self._readers[index]
        items = [*reader.add(text), *(reader.end() if is_last else ())]
        calls = [_call(item) for item in items if isinstance(item, Call)]
        self._called[index] += len(calls)
        return "".join(item for item in items if isinstance(item, str)), calls

    def _finish(self, index: int, piece: Piece) -> str | None:
        return "tool_calls" if piece.finish == "stop" and self._called[index] else piece.finish

    def _usage(self, ends: Sequence[Usage | None]) -> dict[str, Any]:
        """Of all choices together; those of one prompt share it."""
        found = [end for end in ends if end is not None]
        firsts = found[:: self._asked.choices]
        prompt, drawn = sum(end.prompt for end in firsts), sum(end.completion for end in found)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {"cached_tokens": sum(end.cached for end in firsts)},
        }

    def _told(self, pieces: Sequence[Piece], offset: int = 0) -> dict[str, Any] | None:
        """The log-probabilities of the tokens, if they are asked for."""
        if self._asked.top is None:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        if self._asked.chat:
            return {"content": [self._entry(token) for token in tokens], "refusal": None}
        words = [self._word(token.number) for token in tokens]
        offsets = [offset + sum(map(len, words[:place])) for place in range(len(words))]
        return {
            "tokens": words,
            "token_logprobs": [_finite(token.log_prob) for token in tokens],
            "top_logprobs": [{self._word(number): _finite(value) for number, value in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        return {
            **self._likelihood(token.number, token.log_prob),
            "top_logprobs": [self._likelihood(*pair) for pair in token.top],
        }

    def _likelihood(self, number: int, log_prob: float | None) -> dict[str, Any]:
        word = self._word(number)
        return {"token": word, "logprob": _finite(log_prob), "bytes": list(word.encode())}


def _call(call: Call) -> dict[str, Any]:
    # Mistral's templates take only ids of nine letters and digits, and no template asks for others.
    return {"id": secrets.token_hex(5)[:9], "type": "function", "function": call._asdict()}


def _finite(log_prob: float | None) -> float:
    """The log-probability, or what OpenAI tells of a token that is never drawn: JSON has no infinity."""
    return max(LEAST, log_prob) if log_prob is not None else LEAST
