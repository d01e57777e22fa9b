"""Ranks a valid request stage by stage: admission, feature fetch, assembly, scoring, utility and selection."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import structlog

from feature_client.codec import RowState
from feature_client.estimates import RunningQuantile
from feature_client.features import FetchedFeatures
from model_store.exploration.explorer import Explored, Explorer, Tuned, Withheld
from server.errors import DeadlineError, OverloadedError
from server.request.features import FeatureReader
from server.request.routing import ServedModel
from server.request.scoring import Scores
from server.scheduling.admission import Admit, Ask, Refuse, Trim, UseCheaper
from server.scheduling.contract import Ticket
from server.scheduling.engine_streams import Runner
from server.telemetry.metrics import ExplorationMetrics

_log = structlog.get_logger(__name__)

#: Estimated time from the end of a request's last run to its answer, until the first answer was timed.
_TAIL_S = 0.0005
#: After a request was refused or cut, no request explores for so long: under overload, answers should be the best.
_CALM_S = 1.0
_PASSED = "the deadline had passed on arrival; nothing was read or scored"


@dataclass(slots=True)
class RankQuery:
    """A valid request.

    Attributes:
        label: the label whose model answers; empty if the request asks for a version.
        lane: the scheduling lane: the request's surface, or the lane of shadow requests.
        pin_ids: uint64[N], distinct.
        query_vector: float32[D] in the model's query space; at most one of this and `query_pin_id` is set.
        served: the requested model.
        cheaper: the model that may answer instead under overload, if any.
        top_k: number of candidates to return; 0 returns all.
        deadline_s: on the `time.monotonic` clock.
        request_id: names the answer; 0 for a request whose answer nobody gets, such as one for comparison.
        caller: who asks, as the scheduler tells callers apart; empty for the server itself.
    """

    user_id: int
    pin_ids: np.ndarray
    surface: str
    lane: str
    label: str
    query_pin_id: int | None
    query_vector: np.ndarray | None
    served: ServedModel
    cheaper: ServedModel | None
    top_k: int
    explain: bool
    deadline_s: float
    request_id: int = 0
    caller: str = ""


@dataclass(slots=True)
class Ranking:
    """An answer: the order of the candidates, the predictions behind it, and its timings.

    Attributes:
        served: the model that answered.
        scores: the order, and the predictions behind it.
        stage_s: seconds by stage.
        degradation: values by field of `pinrank.v1.Degradation`, without zeros.
        fetched: the features that were read.
        explorer: what could have explored this request; None if it could not.
        explored: how it was explored; None if its order is the tuned one.
    """

    served: ServedModel
    scores: Scores
    stage_s: dict[str, float]
    degradation: dict[str, int]
    fetched: FetchedFeatures
    explorer: Explorer | None = None
    explored: Explored | None = None


class Pipeline:
    """Ranks requests. Belongs to one event loop; only the engine runs on other threads."""

    def __init__(
        self,
        features: FeatureReader,
        runner: Runner,
        fetch_budget_share: float,
        margin_s: float,
        exploration: ExplorationMetrics,
        *,
        explore: bool,
    ) -> None:
        self._features = features
        self._runner = runner
        self._fetch_budget_share = fetch_budget_share
        self._margin_s = margin_s
        #: 90th percentile of the seconds from the end of a request's last run to its answer.
        self._tail = RunningQuantile(0.9, _TAIL_S)
        self._store_failure: str | None = None
        self._exploration = exploration
        self._explore = explore
        self._calm_from_s = float("-inf")

    def check_queue(self, deadline_s: float) -> None:
        """Refuse a request before it is parsed, if the queue alone decides.

        Args:
            deadline_s: its deadline, on the `time.monotonic` clock; infinite if it is not known yet.

        Raises:
            OverloadedError: every request would be refused.
            DeadlineError: the deadline has passed.
        """
        if time.monotonic() >= deadline_s:
            raise DeadlineError(_PASSED)
        refusal = self._runner.refusal_of_any(deadline_s)
        if refusal is not None:
            self._calm_from_s = time.monotonic() + _CALM_S
            raise OverloadedError(refusal.reason, refusal.retry_after_s)

    async def rank(self, query: RankQuery) -> Ranking:
        """Rank one request.

        Raises:
            OverloadedError: the server refused the request on arrival.
            DeadlineError: the request could not be scored before its deadline.
            ScoringError: the engine failed.
        """
        rows = len(query.pin_ids)
        if time.monotonic() >= query.deadline_s:
            raise DeadlineError(_PASSED)
        model, cheaper = query.served.model, query.cheaper
        ask = Ask(
            surface=query.lane,
            rows=rows,
            bytes=model.bytes_of(rows),
            deadline_s=query.deadline_s - self._tail.value - self._margin_s,
            model=model.digest,
            cheaper=cheaper.model.digest if cheaper else None,
            caller=query.caller,
        )
        served, degradation = query.served, {}
        admitted = self._runner.admit(ask)
        if not isinstance(admitted, Admit):
            self._calm_from_s = time.monotonic() + _CALM_S
        match admitted:
            case Refuse(reason, retry_after_s):
                raise OverloadedError(reason, retry_after_s)
            case Admit(ticket):
                pass
            case Trim(ticket):
                degradation["pins_trimmed"] = rows - ticket.rows
            case UseCheaper(ticket):
                assert cheaper is not None, "admission offers a cheaper model only if the ask names one"  # noqa: S101
                served, degradation["cheaper_model"] = cheaper, 1
        served.in_flight += 1  # no await since the request's model was chosen, so it cannot have been dropped
        try:
            return await self._rank_admitted(query, served, ticket, degradation)
        finally:
            served.in_flight -= 1
            self._runner.release(ticket, ask.bytes)

    async def _rank_admitted(
        self, query: RankQuery, served: ServedModel, ticket: Ticket, degradation: dict[str, int]
    ) -> Ranking:
        model = served.model
        start = time.perf_counter()
        fetched = await self._features.fetch(
            model.needs,
            query.user_id,
            query.pin_ids[: ticket.rows],
            query.query_pin_id,
            (query.deadline_s - time.monotonic()) * self._fetch_budget_share,
        )
        self._note_store(fetched.store_failure)
        fetch_end = time.perf_counter()
        batch = model.assembler.assemble(fetched, query.surface, query.query_vector)
        assemble_end = time.perf_counter()
        scored = await self._runner.score(ticket, model, batch, query.deadline_s)
        score_end = time.perf_counter()
        scores = served.scoring[query.surface].score(scored.logits, fetched, query.pin_ids, query.top_k)
        utility_end = time.perf_counter() - scores.order_s
        explorer = self._explorer(query, served)
        explored = None if explorer is None else self._explored(explorer, query, scores)
        degradation |= _degradation(fetched, scores)
        served.observe(scores, batch)
        select_end = time.perf_counter()
        self._tail.observe(time.monotonic() - scored.ended_s)
        return Ranking(
            served,
            scores,
            {
                "fetch": fetch_end - start,
                "assemble": assemble_end - fetch_end,
                # Everything except the engine's run: the wait for a stream, and the hops to its thread and back.
                "queue": score_end - assemble_end - scored.run_s,
                "score": scored.run_s,
                "utility": utility_end - score_end,
                "select": select_end - utility_end,
            },
            degradation,
            fetched,
            explorer,
            explored,
        )

    def _explorer(self, query: RankQuery, served: ServedModel) -> Explorer | None:
        """Return what may explore a request: nothing if exploration is off, or while the server is overloaded."""
        if not self._explore or served.exploration is None or not query.request_id:
            return None
        if time.monotonic() < self._calm_from_s:
            return None
        return served.exploration.surfaces.get(query.surface)

    def _explored(self, explorer: Explorer, query: RankQuery, scores: Scores) -> Explored | None:
        """Explore a request if its lot says so, and put the answer into that order; None leaves the tuned order."""
        if not explorer.explores(query.request_id):  # most requests: before arrays are made for `explore`
            return None
        decision = explorer.explore(
            query.request_id, query.pin_ids, scores.party_utilities, scores.utilities, scores.top
        )
        if isinstance(decision, Tuned):
            return None
        self._exploration.count(query.surface, decision)
        if isinstance(decision, Withheld):
            return None
        scores.rearrange(decision.order, decision.utilities, query.pin_ids)
        return decision

    def _note_store(self, failure: str | None) -> None:
        """Log when the store fails and when it recovers, but not every failed request in between."""
        if failure and not self._store_failure:
            _log.warning("feature_store_failed", reason=failure)
        elif self._store_failure and not failure:
            _log.info("feature_store_back")
        self._store_failure = failure


def _degradation(fetched: FetchedFeatures, scores: Scores) -> dict[str, int]:
    non_finite = scores.non_finite
    if not non_finite and not fetched.stale_rows and fetched.store_failure is None and fetched.complete:
        return {}
    missing = fetched.missing()
    found = {
        "user_missing": missing.user,
        "sequence_missing": fetched.sequence_state != RowState.PRESENT,
        "pins_missing": missing.candidates,
        "sequence_pins_missing": missing.event_pins,
        "query_missing": missing.query_pin,
        "foreign_values": missing.foreign,
        "store_unavailable": fetched.store_unavailable,
        "stale_rows": fetched.stale_rows,
        "non_finite_scores": non_finite,
        "fallback_order": non_finite == scores.scored,
    }
    return {name: value for name, value in found.items() if value}
