"""Running the application: uvicorn, from the first request to the last one that a signal still lets finish."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jlora.errors import UserError
from jlora.types import require

uvicorn: Any = require("uvicorn", "serve")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """A server that a signal ends in peace: uvicorn's own would raise it again afterwards, and the process die of it.

    Attributes:
        leaving: called when a signal came.
    """

    leaving: Callable[[], None] = staticmethod(lambda: None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM end the server when its requests are answered; a second SIGINT at once."""
        if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, number: int, frame: Any) -> None:
        self.leaving()
        super().handle_exit(number, frame)


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


def run(application: Any, at: socket.socket, *, drain: float, leaving: Callable[[], None]) -> None:
    """Serves until a signal comes and what had been asked by then is answered.

    Args:
        drain: the most seconds that this may take.
        leaving: called when the signal comes.
    """
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, timeout_graceful_shutdown=drain, lifespan="off"
    )
    server = Server(config)
    server.leaving = leaving
    server.run(sockets=[at])
