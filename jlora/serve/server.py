"""Running the application: uvicorn, from the first request to the last one that a signal still lets finish."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

from jlora.errors import UserError
from jlora.serve.engine import Engine
from jlora.types import require

uvicorn: Any = require("uvicorn", "serve")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5  # seconds for connections to end after their answers
IDLE = 60  # seconds that a connection may be without a request, or take to say what it asks for


class Server(uvicorn.Server):
    """A server that signals end in peace: uvicorn's own would raise them again afterwards, and the process die of it.

    After SIGINT or SIGTERM no request is taken any more, and the server ends when those that it has are answered. After
    `drain` seconds, or a second SIGINT, answers that are not complete end with an error. A third SIGINT ends the
    process as it is. If the engine fails, the server ends too.
    """

    def __init__(self, config: Any, engine: Engine, drain: float = 60) -> None:
        super().__init__(config)
        self._engine, self._drain, self._is_cut = engine, drain, False
        self._idle: dict[Any, float] = {}  # connections without a request after their last one, and since when

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, signals do what is said above."""
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: signals are still caught when the server has ended and the engine has not."""
        yield

    def handle_exit(self, number: int, frame: Any) -> None:
        if not self.should_exit:
            self.should_exit = True
            self._engine.close()
        elif number == signal.SIGINT and not self._is_cut:
            self._is_cut = True
            self._engine.cut()
        elif number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            self._close_idle()
        return await super().on_tick(counter) or self._engine.failure is not None

    def _close_idle(self) -> None:
        """Closes connections that have asked for nothing for long; uvicorn itself does so only after a first answer."""
        now = time.monotonic()
        last = [(one, one.cycle) for one in self.server_state.connections]
        found = [pair for pair in last if pair[1] is None or pair[1].response_complete]
        self._idle = {pair: self._idle.get(pair, now) for pair in found}
        for (one, _), since in self._idle.items():
            if now - since > IDLE:
                one.transport.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._drain, self._engine.cut)
        await super().shutdown(sockets)
        timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any that is free.

    Raises:
        UserError: that cannot be done.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}") from error


def run(application: Any, at: socket.socket, engine: Engine, *, drain: float) -> None:
    """Serves until a signal ends it or the engine fails; then the engine has stopped too.

    Args:
        drain: the most seconds after a signal for what had been asked by then.
    """
    config = uvicorn.Config(
        _without_trace(application),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=drain + GRACE,
        lifespan="off",
        ws="none",
    )
    server = Server(config, engine, drain)
    with server.signals():
        try:
            server.run(sockets=[at])
        finally:
            engine.stop(drain=False)


def _without_trace(application: Any) -> Any:
    """The application, whose requests may be cancelled without a traceback in the log."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        # Of clients that neither listen nor go away. uvicorn tells how many there were, and closes their connections.
        with contextlib.suppress(asyncio.CancelledError):
            await application(scope, receive, send)

    return run
