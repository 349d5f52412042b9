"""What a server has done, for Prometheus."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from jlora.serve.engine import Engine
from jlora.serve.request import Piece
from jlora.types import require

prometheus: Any = require("prometheus_client", "serve")
core: Any = require("prometheus_client.core", "serve")

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GAUGES = {
    "running": "requests that have a row",
    "waiting": "requests in the queue",
    "cache_tokens": "tokens that a row of the cache has room for",
}


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._registry.register(_Collector(engine))
        settings = dict(registry=self._registry, buckets=SECONDS)
        self._first = prometheus.Histogram("jlora_first_piece_seconds", "from a request to its first text", **settings)
        self._whole = prometheus.Histogram("jlora_request_seconds", "from a request to its end", **settings)
        self._refused = prometheus.Counter(
            "jlora_refused", "requests that got an error", ["status"], registry=self._registry
        )

    @property
    def media_type(self) -> str:
        return prometheus.CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """All metrics as they are now."""
        return prometheus.generate_latest(self._registry)

    def refused(self, status: int) -> None:
        """Notes a request that got an error."""
        self._refused.labels(str(status)).inc()

    def observer(self, started: float) -> Callable[[Piece], None]:
        """What notes the times of a request that came at `started` (`time.perf_counter`), given each of its pieces."""
        seen: list[Piece] = []

        def observe(piece: Piece) -> None:
            if not seen:
                self._first.observe(time.perf_counter() - started)
            if piece.finish:
                self._whole.observe(time.perf_counter() - started)
            seen.append(piece)

        return observe


class _Collector:
    """The engine's own numbers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        load = self._engine.load
        for name, told in GAUGES.items():
            yield core.GaugeMetricFamily(f"jlora_{name}", told, load[name])
        yield core.GaugeMetricFamily("jlora_adapters", "adapters that are served", len(self._engine.adapters))
        yield core.GaugeMetricFamily("jlora_programs", "compiled programs", len(self._engine.programs))
        numbers = dict(self._engine.numbers)
        ends = core.CounterMetricFamily("jlora_requests", "requests, by how they ended", labels=["end"])
        for name, value in numbers.items():
            if name.startswith("ended_"):
                ends.add_metric([name.removeprefix("ended_")], value)
            else:
                yield core.CounterMetricFamily(f"jlora_{name}", name.replace("_", " "), value)
        yield ends
