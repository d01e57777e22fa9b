"""Compare the near cache's hit rate on power-law traffic with LRU, S3-FIFO and the static optimum; time its lookups."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bench.features.synthetic import power_law
from bench.harness import Claim, Conclusion, Raw, markdown_table
from bench.test_bed import SEED
from feature_client.codec import Rows
from feature_client.groups import Embedding, EmbeddingSpace, FeatureGroup, Scalar
from feature_client.near_cache import NearCache

GROUP = FeatureGroup(
    name="pins",
    version=1,
    entity="pin",
    fields=(Embedding(name="embedding", space=EmbeddingSpace(name="s", version=1, dim=32)), Scalar(name="popularity")),
)
_REQUEST = 228
#: Bytes that the cache adds to a row. The number of places is rounded down to a power of two.
_PLACE_BYTES = 33


@dataclass(frozen=True, slots=True)
class NearCachePlan:
    pins: int = 1_000_000
    requests: int = 12_000
    warmup: int = 8_000
    parts: tuple[float, ...] = (0.01, 0.05, 0.2)
    exponents: tuple[float, ...] = (0.8, 1.0)
    #: Places of the caches whose lookups are timed: the smaller one fits into the processor's caches.
    places: tuple[int, int] = (1 << 12, 1 << 20)
    lookups: int = 1_000


QUICK = NearCachePlan(
    pins=2_000, requests=60, warmup=40, parts=(0.5,), exponents=(0.8,), places=(1 << 8, 1 << 9), lookups=20
)
#: Between two lookups, other work writes so many bytes: more than a core's own caches hold.
_OTHER_WORK_BYTES = 4 << 20


class _Lru:
    def __init__(self, places: int) -> None:
        self._places = places
        self._held: OrderedDict[int, None] = OrderedDict()

    def hit(self, pin: int) -> bool:
        if pin in self._held:
            self._held.move_to_end(pin)
            return True
        self._held[pin] = None
        if len(self._held) > self._places:
            self._held.popitem(last=False)
        return False


class _S3Fifo:
    """Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023): small, main and ghost queues."""

    def __init__(self, places: int) -> None:
        self._small_max = max(1, places // 10)
        self._main_max = places - self._small_max
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}

    def hit(self, pin: int) -> bool:
        if pin in self._uses:
            self._uses[pin] = min(3, self._uses[pin] + 1)
            return True
        self._uses[pin] = 0
        if pin in self._ghost:
            del self._ghost[pin]
            self._into_main(pin)
            return False
        self._small.append(pin)
        if len(self._small) > self._small_max:
            oldest = self._small.popleft()
            if self._uses[oldest] > 0:
                self._uses[oldest] = 0
                self._into_main(oldest)
            else:
                del self._uses[oldest]
                self._ghost[oldest] = None
                if len(self._ghost) > self._main_max:
                    self._ghost.popitem(last=False)
        return False

    def _into_main(self, pin: int) -> None:
        self._main.append(pin)
        while len(self._main) > self._main_max:
            oldest = self._main.popleft()
            if self._uses[oldest] > 0:
                self._uses[oldest] -= 1
                self._main.append(oldest)
            else:
                del self._uses[oldest]


def measure(*, quick: bool = False) -> Iterator[Raw]:
    plan = QUICK if quick else NearCachePlan()
    yield {
        "pins": plan.pins,
        "found": [_measure(plan, exponent, part) for exponent in plan.exponents for part in plan.parts],
        "lookups": [_time_lookups(places, plan.lookups) for places in plan.places],
    }


def conclude(raw: Raw) -> Conclusion:
    found = raw["found"]
    worst = min(f["near_cache"] / f["s3_fifo"] for f in found)
    lookups = raw["lookups"]
    claims = (
        Claim("hit rate over S3-FIFO's, at worst", worst, 0.97, "ratio", "at_least"),
        Claim(
            "a lookup of a known pin, in a cache larger than the processor's",
            lookups[-1]["native"],
            60.0,
            "ns",
            "at_most",
        ),
    )
    header = ("exponent", "places, part of pins", "near cache", "S3-FIFO", "LRU", "static optimum")
    rows = [
        (
            f"{f['exponent']:g}", f"{f['part']:g}",
            *(f"{f[way]:.3f}" for way in ("near_cache", "s3_fifo", "lru", "optimum")),
        )
        for f in found
    ]  # fmt: skip
    timed = [
        (f"{f['places']:,.0f}", f"{f['bytes'] / 1e6:.1f}", f"{f['native']:.0f}", f"{f['numpy']:.0f}") for f in lookups
    ]
    tables = (
        markdown_table("Hit rates", header, rows),
        markdown_table("Lookups of known pins, ns a pin", ("places", "MB", "C++", "NumPy"), timed),
    )
    summary = {"hit rate over S3-FIFO's, at worst": worst, "ns a pin": lookups[-1]["native"]}
    return Conclusion(summary, claims, "\n".join(tables))


def _time_lookups(places: int, lookups: int) -> dict[str, float]:
    """Time lookups of cached pins, C++ and NumPy by turns, after work that empties the processor's caches: ns a pin."""
    rng = np.random.default_rng(SEED)
    caches = {
        way: NearCache(GROUP, places * (GROUP.dtype.itemsize + _PLACE_BYTES), 1e9, native=way == "native")
        for way in ("native", "numpy")
    }
    known = rng.integers(0, 1 << 63, places * 3 // 4).astype(np.uint64)
    for cache in caches.values():
        cache.put(known, Rows(np.zeros(len(known), GROUP.dtype), np.zeros(len(known), np.uint8)), 0.0)
    _, absent = caches["native"].get(known, 0.0)
    cached = known if absent is None else known[~absent]  # some sets had more pins than places
    other_work = np.zeros(_OTHER_WORK_BYTES, np.uint8)
    took_s: dict[str, list[float]] = {way: [] for way in caches}
    for _ in range(lookups):
        for way, cache in caches.items():
            ids = cached[rng.integers(0, len(cached), _REQUEST)]
            other_work += 1
            start_s = time.perf_counter()
            cache.get(ids, 0.0)
            took_s[way].append(time.perf_counter() - start_s)
    medians = {way: float(np.median(took)) / _REQUEST * 1e9 for way, took in took_s.items()}
    return {"places": places, "bytes": caches["native"].nbytes, **medians}


def _measure(plan: NearCachePlan, exponent: float, part: float) -> dict[str, float]:
    rng = np.random.default_rng(SEED)
    shares = power_law(plan.pins, exponent)
    wanted = int(part * plan.pins)
    cache = NearCache(GROUP, wanted * (GROUP.dtype.itemsize + _PLACE_BYTES), 1e9)
    places = cache.places
    others: dict[str, _Lru | _S3Fifo] = {"lru": _Lru(places), "s3_fifo": _S3Fifo(places)}
    hits = dict.fromkeys(("near_cache", *others), 0)
    seen = 0
    cumulative = np.cumsum(shares)
    for number in range(plan.requests):
        # Spread ids, unrelated to popularity, like real ones.
        drawn = np.minimum(np.searchsorted(cumulative, rng.random(_REQUEST)), plan.pins - 1)
        ids = np.unique(drawn).astype(np.uint64) * np.uint64(2_654_435_761)
        _, absent = cache.get(ids, 0.0)
        if absent is not None:
            missed = ids[absent]
            cache.put(missed, Rows(np.zeros(len(missed), GROUP.dtype), np.zeros(len(missed), np.uint8)), 0.0)
        measured = number >= plan.warmup
        if measured:
            seen += len(ids)
            hits["near_cache"] += len(ids) - (0 if absent is None else int(np.count_nonzero(absent)))
        for name, other in others.items():
            count = sum(map(other.hit, ids.tolist()))
            if measured:
                hits[name] += count
    # A request names a pin once. This is the hit rate of a cache that always holds the most popular pins.
    once = 1 - (1 - shares) ** _REQUEST
    return {
        "exponent": exponent, "part": part, "places": places, **{name: count / seen for name, count in hits.items()},
        "optimum": float(once[:places].sum() / once.sum()),
    }  # fmt: skip
