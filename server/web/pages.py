"""What paths of the HTTP port answer with: the metrics, rendered at most once in a while, and verdicts of probes."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from http import HTTPStatus

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from server.web.http_port import Answer
from server.web.messages import Request, Response, text

#: Returns the metrics to show, one after the other.
Families = Callable[[], AsyncIterator[Metric]]

#: A collection holds the interpreter for about this long and then leaves it to the server's event loop. Python would
#: take it away after 5 ms (sys.getswitchinterval), of which a request with a budget of 10 ms has nothing left.
_TURN_S = 0.0005
_PAUSE_S = 0.001
#: Samples that are rendered at once, in about a quarter of a turn; a histogram of 20 surfaces has 540.
_SAMPLES = 64
#: Higher levels take several times as long for a few percent.
_GZIP_LEVEL = 4


def site(pages: Mapping[str, Answer]) -> Answer:
    """Return what answers a request by its path."""

    async def answer(request: Request) -> Response:
        page = pages.get(request.path)
        if page is None:
            return text(HTTPStatus.NOT_FOUND, f"not found; this server has {', '.join(pages)}")
        return await page(request)

    return answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to a probe.

    Attributes:
        good: whether the status is 200; otherwise it is 503.
        lines: the verdict in words, and its reasons.
    """

    good: bool
    lines: tuple[str, ...]


def probe(judge: Callable[[], Verdict | Awaitable[Verdict]]) -> Answer:
    """Return the page of a probe."""

    async def answer(_: Request) -> Response:
        found = judge()
        verdict = found if isinstance(found, Verdict) else await found
        return text(HTTPStatus.OK if verdict.good else HTTPStatus.SERVICE_UNAVAILABLE, *verdict.lines)

    return answer


class _Collection:
    """The text of one collection.

    Attributes:
        began_s: when it began, on the monotonic clock.
    """

    def __init__(self, began_s: float, body: bytes) -> None:
        self.began_s = began_s
        self.body = body

    @cached_property
    def compressed(self) -> bytes:
        return gzip.compress(self.body, _GZIP_LEVEL, mtime=0)  # without the interpreter lock


class MetricsPage:
    """Renders metrics in Prometheus' text format, at most once in `age_s_max`. Belongs to the HTTP port's loop."""

    def __init__(self, families: Families, age_s_max: float) -> None:
        self._families = families
        self._age_s_max = age_s_max
        self._latest: _Collection | None = None
        self._rendering: asyncio.Task[_Collection] | None = None

    async def answer(self, request: Request) -> Response:
        collection = self._latest
        if collection is None or time.monotonic() - collection.began_s >= self._age_s_max:
            if self._rendering is None or self._rendering.done():
                self._rendering = asyncio.get_running_loop().create_task(self._render())
            # A scraper that hangs up ends its own wait only.
            collection = await asyncio.shield(self._rendering)
        vary = ("Vary", "Accept-Encoding")
        if request.gzip:
            fields = vary, ("Content-Encoding", "gzip")
            return Response(HTTPStatus.OK, collection.compressed, CONTENT_TYPE_PLAIN_0_0_4, fields)
        return Response(HTTPStatus.OK, collection.body, CONTENT_TYPE_PLAIN_0_0_4, (vary,))

    async def _render(self) -> _Collection:
        began_s = turn_s = time.monotonic()
        pieces = [f"# collected {datetime.now(UTC).isoformat(timespec='milliseconds')}\n".encode()]
        async for family in self._families():
            for piece in _pieces(family):
                pieces.append(piece)
                if time.monotonic() - turn_s >= _TURN_S:
                    await asyncio.sleep(_PAUSE_S)
                    turn_s = time.monotonic()
        self._latest = _Collection(began_s, b"".join(pieces))
        return self._latest


def _pieces(family: Metric) -> Iterator[bytes]:
    """Render one metric, a few samples at a time."""
    # Of OpenMetrics, which Prometheus' text format does not know: when a counter was made, as a metric of its own.
    samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    for start in range(0, max(1, len(samples)), _SAMPLES):
        part = Metric(family.name, family.documentation, family.type)
        part.samples = samples[start : start + _SAMPLES]
        rendered = generate_latest(_Alone(part))
        yield rendered if start == 0 else rendered.split(b"\n", 2)[2]  # without the lines HELP and TYPE


class _Alone(Collector):
    """One metric, which `generate_latest` renders; with the whole registry it would not pause in between."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def families_of(registry: CollectorRegistry) -> Families:
    """Return what collects a registry's metrics."""

    async def collect() -> AsyncIterator[Metric]:
        for family in registry.collect():
            yield family

    return collect
