"""One request's way through the server, stage by stage."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np
import structlog

from feature_client.codec import State
from feature_client.fetcher import Fetched, fetch
from feature_client.store import Store
from server.admission import Admission, Refused
from server.errors import DeadlineError, OverloadedError
from server.metrics import Metrics
from server.runner import Runner
from server.selection import select
from server.served import Served

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RankQuery:
    """A valid request.

    Attributes:
        pin_ids: uint64[N], distinct.
        query_vector: float32[D] in the model's query space; at most one of it and `query_pin_id` is set.
        served: the model that answers, held to the end.
        top_k: 0 returns all.
        deadline_s: on the `time.monotonic` clock.
    """

    user_id: int
    pin_ids: np.ndarray
    surface: str
    query_pin_id: int | None
    query_vector: np.ndarray | None
    served: Served
    top_k: int
    explain: bool
    deadline_s: float


@dataclass(slots=True)
class Ranking:
    """An answer: candidates as positions, best first, and how it came about.

    Attributes:
        order: int64[K], positions into the request's pin_ids.
        utilities: float32[N], probabilities: float32[N, H], party_utilities: float64[N, P]; request order.
        stage_s: seconds by stage.
        degradation: what is zero or False is left out.
    """

    order: np.ndarray
    utilities: np.ndarray
    probabilities: np.ndarray
    party_utilities: np.ndarray
    stage_s: dict[str, float] = field(default_factory=dict)
    degradation: dict[str, int] = field(default_factory=dict)


class Pipeline:
    """Ranks. Belongs to one event loop; the network runs elsewhere, everything else here."""

    def __init__(
        self, store: Store, admission: Admission, runner: Runner, metrics: Metrics, fetch_budget_share: float
    ) -> None:
        self._store = store
        self._admission = admission
        self._runner = runner
        self._metrics = metrics
        self._fetch_budget_share = fetch_budget_share
        self._idle = asyncio.Event()
        self._idle.set()
        self._store_failure: str | None = None

    @property
    def in_flight(self) -> int:
        return self._admission.requests

    async def drained(self) -> None:
        """Wait until nothing is in flight."""
        await self._idle.wait()

    async def rank(self, query: RankQuery) -> Ranking:
        """Rank one request.

        Raises:
            OverloadedError: refused on arrival.
            DeadlineError: not scored in time.
            ScoringError: the engine failed.
        """
        rows = len(query.pin_ids)
        self._admit(query, rows)
        try:
            return await self._rank_admitted(query)
        finally:
            self._admission.release(rows)
            self._publish_in_flight()

    def _admit(self, query: RankQuery, rows: int) -> None:
        if time.monotonic() >= query.deadline_s:
            raise DeadlineError("the deadline had passed on arrival; nothing was read or scored")
        engine = query.served.live.engine
        clear_s = engine.cost_s(self._admission.requests, self._admission.rows) / engine.streams
        match self._admission.offer(rows, clear_s):
            case Refused(reason, retry_after_s):
                raise OverloadedError(reason, retry_after_s)
        self._publish_in_flight()

    async def _rank_admitted(self, query: RankQuery) -> Ranking:
        live, utility = query.served.live, query.served.utility
        start = time.perf_counter()
        budget_s = (query.deadline_s - time.monotonic()) * self._fetch_budget_share
        fetched = await fetch(self._store, live.needs, query.user_id, query.pin_ids, query.query_pin_id, budget_s)
        self._note_store(fetched.store_failure)
        fetch_end = time.perf_counter()
        batch = live.assembler.assemble(fetched, query.surface, query.query_vector)
        assemble_end = time.perf_counter()
        scored = await self._runner.score(live, batch, query.deadline_s)
        score_end = time.perf_counter()
        probabilities = live.probabilities(scored.logits)
        party_utilities = utility.party_utilities(query.surface, probabilities, fetched)
        utilities = utility.combine(query.surface, party_utilities)
        utility_end = time.perf_counter()
        order = select(utilities, query.top_k)
        select_end = time.perf_counter()
        return Ranking(
            order,
            utilities,
            probabilities,
            party_utilities,
            {
                "fetch": fetch_end - start,
                "assemble": assemble_end - fetch_end,
                # All that is not the engine's own work: waiting for a stream, and the way to its thread and back.
                "queue": score_end - assemble_end - scored.run_s,
                "score": scored.run_s,
                "utility": utility_end - score_end,
                "select": select_end - utility_end,
            },
            _degradation(fetched, utilities),
        )

    def _publish_in_flight(self) -> None:
        self._metrics.requests_in_flight.set(self._admission.requests)
        self._metrics.rows_in_flight.set(self._admission.rows)
        if self._admission.requests:
            self._idle.clear()
        else:
            self._idle.set()

    def _note_store(self, failure: str | None) -> None:
        """Log when the store fails and when it is back, not every request in between."""
        if failure and not self._store_failure:
            _log.warning("feature_store_failed", reason=failure)
        elif self._store_failure and not failure:
            _log.info("feature_store_back")
        self._store_failure = failure


def _degradation(fetched: Fetched, utilities: np.ndarray) -> dict[str, int]:
    non_finite = len(utilities) - int(np.count_nonzero(np.isfinite(utilities)))
    lacks = fetched.lacks()
    found = {
        "user_missing": lacks.user,
        "sequence_missing": fetched.sequence_state != State.PRESENT,
        "pins_missing": lacks.candidates,
        "sequence_pins_missing": lacks.event_pins,
        "query_missing": lacks.query_pin,
        "foreign_values": lacks.foreign,
        "store_unavailable": fetched.store_unavailable,
        "non_finite_scores": non_finite,
        "fallback_order": non_finite == len(utilities),
    }
    return {name: value for name, value in found.items() if value}
