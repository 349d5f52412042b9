"""The HTTP side: OpenAI's end points over an engine, as a Starlette application."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jlora import data
from jlora.errors import UnknownNameError, UserError
from jlora.families.kinds import short
from jlora.serve.engine import Engine
from jlora.serve.folder import Folder
from jlora.serve.forced import beginning
from jlora.serve.forms import CallForms
from jlora.serve.metrics import Metrics
from jlora.serve.protocol import Answer, Asked, Refused, parse, parse_object
from jlora.serve.request import Busy, Piece, Request, Stopping, TooLong
from jlora.serve.slots import Job
from jlora.types import require

applications: Any = require("starlette.applications", "serve")
requests: Any = require("starlette.requests", "serve")
responses: Any = require("starlette.responses", "serve")
routing: Any = require("starlette.routing", "serve")

STATUS = {"cancelled": 503, "error": 500}  # of answers that were not finished
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    413: {"Connection": "close"},  # or the rest of the body would still be read
    429: {"Retry-After": "1"},
}
GONE = 499  # nobody hears it
UPLOAD = 60  # the most seconds that a body may take to come
FEW = 16  # new tokens of a text, if a request does not say how many


@dataclasses.dataclass(frozen=True)
class Service:
    """What is served, and to whom.

    Attributes:
        name: the base's name as a model.
        keys: one of them is needed for /v1; none: everyone may ask.
        body: the most bytes of a request.
    """

    engine: Engine
    tokenizer: Any
    name: str
    folder: Folder | None = None
    keys: tuple[str, ...] = ()
    body: int = 4 << 20


def application(service: Service) -> Any:
    """The Starlette application of a service whose engine runs."""
    return _Handlers(service).application()


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._service, self._engine = service, service.engine
        self._metrics, self._started = Metrics(service.engine), int(time.time())
        self._calls = CallForms(service.tokenizer)
        self._encoding = threading.Lock()  # tokenizers are not made for several threads

    def application(self) -> Any:
        route = routing.Route
        return applications.Starlette(
            routes=[
                route("/health", self.health),
                route("/metrics", self.metrics),
                route("/v1/models", self._guarded(self.models)),
                route("/v1/models/{name:path}", self._guarded(self.model)),
                route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
                route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
                route("/v1/load_lora_adapter", self._guarded(self.load), methods=["POST"]),
                route("/v1/unload_lora_adapter", self._guarded(self.unload), methods=["POST"]),
            ],
            exception_handlers={404: _plain_error, 405: _plain_error, 500: _plain_error},
        )

    async def health(self, request: Any) -> Any:
        """200 while requests are taken, else 503."""
        failure = self._engine.failure
        state = "failed" if failure else "ok" if self._engine.is_open else "stopping"
        return _json({"status": state}, 200 if state == "ok" else 503)

    async def metrics(self, request: Any) -> Any:
        """What Prometheus reads."""
        return responses.Response(self._metrics.text(), media_type=self._metrics.media_type)

    async def models(self, request: Any) -> Any:
        """The base and all adapters."""
        names = [self._service.name, *self._engine.adapters]
        return _json({"object": "list", "data": [self._described(name) for name in names]})

    async def model(self, request: Any) -> Any:
        name = request.path_params["name"]
        self._adapter(name)
        return _json(self._described(name))

    async def chat(self, request: Any) -> Any:
        return await self._answer(request, chat=True)

    async def completions(self, request: Any) -> Any:
        return await self._answer(request, chat=False)

    async def load(self, request: Any) -> Any:
        """Adds or replaces an adapter: {"lora_name": …, "lora_path": …}, a folder within --adapters."""
        name, path = _texts(await self._body(request), "lora_name", "lora_path")
        await asyncio.to_thread(self._folder().load, name, path)
        return responses.PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Any) -> Any:
        """Removes an adapter: {"lora_name": …}."""
        (name,) = _texts(await self._body(request), "lora_name")
        await asyncio.to_thread(self._folder().unload, name)
        return responses.PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    # ---------------------------------------------------------------- the way of a request

    def _guarded(self, handle: Callable) -> Callable:
        """The handler for those with a key, which answers with an error whatever cannot be done."""

        async def guarded(request: Any) -> Any:
            try:
                self._require_key(request)
                return await handle(request)
            except Refused as refused:
                error = refused
            except UnknownNameError as unknown:
                error = Refused(404, str(unknown), "model_not_found")
            except TooLong as long:
                error = Refused(400, str(long), "context_length_exceeded")
            except UserError as mistake:
                error = Refused(400, str(mistake))
            except Busy as busy:
                error = Refused(429, str(busy), "rate_limit_exceeded")
            except Stopping as stopping:
                error = Refused(503, str(stopping))
            except asyncio.CancelledError:  # the server's time is up, and what it has not answered ends
                error = Refused(503, "the server is stopping")
            except requests.ClientDisconnect:
                return responses.Response(status_code=GONE)
            self._metrics.refused(error.status)
            return _json(error.body, error.status, HEADERS.get(error.status))

        return guarded

    def _require_key(self, request: Any) -> None:
        if not self._service.keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        sent = given.strip().encode("latin-1")  # the header's own bytes
        is_known = any(hmac.compare_digest(sent, key.encode()) for key in self._service.keys)
        if kind.lower() != "bearer" or not is_known:
            raise Refused(401, "found no valid key, expected the header Authorization: Bearer KEY", "invalid_api_key")

    async def _body(self, request: Any) -> bytes:
        most, found = self._service.body, bytearray()
        told = request.headers.get("content-length", "0")
        if told.isdigit() and int(told) > most:
            raise Refused(413, f"the body has {told} bytes, expected at most {most}")
        try:
            async with asyncio.timeout(UPLOAD):
                async for part in request.stream():
                    found += part
                    if len(found) > most:
                        raise Refused(413, f"the body has more than {most} bytes")
        except TimeoutError as error:
            raise Refused(408, f"the body is not complete after {UPLOAD} seconds") from error
        return bytes(found)

    async def _answer(self, request: Any, *, chat: bool) -> Any:
        started = time.perf_counter()
        asked = parse(await self._body(request), chat=chat)
        adapter = self._adapter(asked.model)
        prompts, begun = await asyncio.to_thread(self._encoded, asked)
        limits = self._engine.limits
        if (most := limits.rows + limits.queue) < (found := len(prompts) * asked.choices):
            raise Refused(400, f"found {found} answers to give at once, expected at most {most}")
        heard = _Heard(self._engine)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        for tokens in prompts:
            for choice in range(asked.choices):
                heard.submit(self._request(asked, tokens, begun, adapter, seed, choice))
        reader = functools.partial(self._calls.reader, asked.tools) if asked.tools else None
        answer = Answer(asked, self._word, reader)
        observe = self._metrics.observer(started)
        if not asked.stream:
            return await _whole(request, heard, answer, observe)
        events = _events(heard, answer, asked, observe)
        return responses.StreamingResponse(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    def _request(
        self, asked: Asked, tokens: Sequence[int], begun: int, adapter: str | None, seed: int, choice: int
    ) -> Request:
        room = max(1, self._engine.length - len(tokens))
        default = room if asked.chat else min(FEW, room)
        return Request(
            tokens,
            default if asked.max_new_tokens is None else asked.max_new_tokens - begun,
            adapter,
            asked.sampling,
            seed,
            choice,
            asked.stop,
            asked.stop_ids,
            asked.ignore_end,
            asked.top,
            self._calls.kept if asked.tools else (),
            begun,
        )

    def _encoded(self, asked: Asked) -> tuple[list[Sequence[int]], int]:
        """The prompts as tokens, and how many of the last ones are what the answer begins with."""
        tokenizer = self._service.tokenizer
        with self._encoding:
            prompts = [
                prompt
                if isinstance(prompt, list) and not asked.chat
                else data.encode_prompt(prompt, tokenizer, asked.variables)
                for prompt in asked.prompts
            ]
            if not asked.calls:
                return prompts, 0
            prompt, call = beginning(self._calls, tokenizer, asked.prompts[0], asked.variables, asked.tools)
        if asked.max_new_tokens is not None and asked.max_new_tokens <= len(call):
            raise Refused(
                400,
                f"max_tokens={asked.max_new_tokens}: expected more than {len(call)}, the tokens that a call begins "
                "with, which tool_choice asks for",
            )
        return [[*prompt, *call]], len(call)

    def _adapter(self, model: str) -> str | None:
        """The adapter that a model's name stands for.

        Raises:
            Refused: there is no such model.
        """
        if model == self._service.name:
            return None
        if model not in self._engine.adapters:
            raise Refused(404, f"the model {short(model)} does not exist", "model_not_found")
        return model

    def _folder(self) -> Folder:
        if self._service.folder is None:
            raise Refused(400, "adapters cannot be loaded: the server was started without --adapters")
        return self._service.folder

    def _described(self, name: str) -> dict[str, Any]:
        base = self._service.name
        parent = None if name == base else base
        found = {"id": name, "object": "model", "created": self._started, "owned_by": "jlora"}
        return found | {"root": base, "parent": parent, "max_model_len": self._engine.length}

    def _word(self, token: int) -> str:
        """A token's text, or its name in the vocabulary if it is only a part of a character."""
        text = self._engine.tokenizer.decode([token])
        return str(self._engine.tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text


class _Heard:
    """The requests of one body, and what is heard of them, in an asyncio queue."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self.pieces: list[list[Piece]] = []

    def submit(self, request: Request) -> None:
        """Submits one more; if it is refused, all are cancelled."""
        index = len(self._jobs)

        def listen(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        try:
            self._jobs.append(self._engine.submit(request, listen))
        except BaseException:
            self.cancel()
            raise
        self.pieces.append([])

    def __len__(self) -> int:
        return len(self._jobs)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        open_ones = set(range(len(self._jobs)))
        while open_ones:
            index, piece = await self._queue.get()
            self.pieces[index].append(piece)
            if piece.finish:
                open_ones.discard(index)
            yield index, piece

    def cancel(self) -> None:
        """Ends those that have not ended."""
        for job in self._jobs:
            self._engine.cancel(job)


async def _whole(request: Any, heard: _Heard, answer: Answer, observe: Callable[[Piece], None]) -> Any:
    async def hear() -> None:
        async for _, piece in heard:
            observe(piece)

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(hear()), asyncio.ensure_future(leave())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        heard.cancel()
    if not all(pieces and pieces[-1].finish for pieces in heard.pieces):
        return responses.Response(status_code=GONE)
    for pieces in heard.pieces:
        if pieces[-1].finish in STATUS:
            raise Refused(STATUS[pieces[-1].finish], pieces[-1].error or "the answer was not finished")
    return _json(answer.whole(heard.pieces))


async def _events(heard: _Heard, answer: Answer, asked: Asked, observe: Callable[[Piece], None]) -> AsyncIterator[str]:
    """The events of a stream; whoever stops listening cancels the requests."""
    try:
        if asked.chat:
            for index in range(len(heard)):
                yield _event(answer.opening(index))
        async for index, piece in heard:
            observe(piece)
            if piece.finish in STATUS:
                yield _event(Refused(STATUS[piece.finish], piece.error or "the answer was not finished").body)
            else:
                for chunk in answer.chunks(index, piece):
                    yield _event(chunk)
        if asked.tells_usage:
            yield _event(answer.last([pieces[-1].usage for pieces in heard.pieces]))
        yield "data: [DONE]\n\n"
    finally:
        heard.cancel()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Any:
    # In ASCII: what clients send, and errors repeat, may have halves of characters, which UTF-8 does not write.
    return responses.Response(json.dumps(body), status, headers, "application/json")


def _texts(body: bytes, *names: str) -> list[str]:
    found = parse_object(body)
    faults = [f"{name}: expected text" for name in names if not (isinstance(found.get(name), str) and found[name])]
    faults += [f"{name[:100]}: unknown; the fields are {', '.join(names)}" for name in found if name not in names]
    if faults:
        raise Refused(400, "\n".join(faults))
    return [found[name] for name in names]


async def _plain_error(request: Any, error: Exception) -> Any:
    status = getattr(error, "status_code", 500)
    told = getattr(error, "detail", "an error of the server")
    body = Refused(status, f"{request.method} {request.url.path}: {told}").body
    return _json(body, status, getattr(error, "headers", None))
