"""Figures for Prometheus: the generations of the whole service, and the requests of the replica that answers."""

import time
from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.records import Records
from serve.schema import State

_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class _Generations:
    """Counted when they are asked for."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts, queue = self._records.counts(), self._records.queue()
        family = GaugeMetricFamily("raydream_generations", "Generations by state.", labels=["state"])
        for state in get_args(State):
            family.add_metric([state], counts.get(state, 0))
        yield family
        oldest_s = time.time() - min(record.created_at for record in queue) if queue else 0.0
        yield GaugeMetricFamily("raydream_queue_age_seconds", "How long the oldest one has waited.", value=oldest_s)


class Meter:
    """What ``GET /metrics`` tells; ``requests`` counts answers."""

    def __init__(self, records: Records) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Generations(records))  # type: ignore[arg-type]  # has all that a Collector needs
        self.requests = Histogram(
            "raydream_http_request_seconds",
            "Seconds to the first byte of an answer.",
            ["method", "route", "status"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Metered:
    """Counts all answers of an application."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self._app, self._meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")  # the pattern, not the path
                method = scope["method"] if route != "none" else "other"  # a client's words are no label
                seconds = time.perf_counter() - started
                self._meter.requests.labels(method, route, str(message["status"])).observe(seconds)
            await send(message)

        await self._app(scope, receive, send_counted if scope["type"] == "http" else send)
