"""`pinrank.v1.ActivityService`: checks actions and hands them to the writers of the served models' sequences."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence

import grpc
import grpc.aio
import numpy as np

from feature_client.activity import ActivityWriter, Outcome, QueueFullError, clock_ms, time_problem
from feature_client.groups import SequenceGroup
from feature_client.store import Store, StoreError
from pinrank.v1 import activity_pb2
from server.edge import abort
from server.errors import (
    DrainingError,
    FieldViolation,
    InvalidRequestError,
    NotRecordingError,
    RankError,
    RecordingFullError,
    StoreDownError,
)
from server.metrics import Metrics

SERVICE = "pinrank.v1.ActivityService"
_VIOLATIONS_MAX = 10

_Context = grpc.aio.ServicerContext[activity_pb2.RecordRequest, activity_pb2.RecordResponse]


class _Sequence:
    """A sequence that actions are recorded into, and the position of each name in its vocabularies."""

    def __init__(self, group: SequenceGroup, writer: ActivityWriter) -> None:
        self.group = group
        self.writer = writer
        self.actions = {name: i for i, name in enumerate(group.actions)}
        self.surfaces = {name: i for i, name in enumerate(group.surfaces)}


class ActivityEdge:
    """Answers Record calls. Every served model's sequence gets the actions that its vocabularies know."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._sequences: tuple[_Sequence, ...] = ()
        self.draining = False

    def write_into(self, groups: Iterable[SequenceGroup], store: Store) -> None:
        """Record into these sequences from now on; those that were recorded into before keep their writers."""
        before = {sequence.group.fingerprint: sequence for sequence in self._sequences}
        distinct = {group.fingerprint: group for group in groups}
        self._sequences = tuple(
            before.get(fingerprint) or _Sequence(group, ActivityWriter(store, group, self._metrics.future_actions.inc))
            for fingerprint, group in distinct.items()
        )

    def handler(self) -> grpc.GenericRpcHandler:
        parse, serialise = activity_pb2.RecordRequest.FromString, activity_pb2.RecordResponse.SerializeToString
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Record": grpc.unary_unary_rpc_method_handler(self.record, parse, serialise),
                "RecordStream": grpc.stream_unary_rpc_method_handler(self.record_stream, parse, serialise),
            },
        )

    async def record(self, request: activity_pb2.RecordRequest, context: _Context) -> activity_pb2.RecordResponse:
        return await self._answer(_one(request), context)

    async def record_stream(
        self, requests: AsyncIterator[activity_pb2.RecordRequest], context: _Context
    ) -> activity_pb2.RecordResponse:
        return await self._answer(requests, context)

    async def _answer(
        self, requests: AsyncIterator[activity_pb2.RecordRequest], context: _Context
    ) -> activity_pb2.RecordResponse:
        counts = np.zeros(len(Outcome), np.int64)
        try:
            async for request in requests:
                counts += await self._store(request.actions)
        except RankError as error:
            await abort(context, error)
        return activity_pb2.RecordResponse(
            added=counts[Outcome.ADDED], repeated_actions=counts[Outcome.REPEATED], too_old=counts[Outcome.TOO_OLD]
        )

    async def _store(self, actions: Sequence[activity_pb2.Action]) -> np.ndarray:
        """Store actions in every sequence that knows them; return int64[3], how many by the best of their outcomes."""
        if self.draining:
            raise DrainingError("the server is shutting down; another replica can answer")
        sequences = self._sequences
        if not sequences:
            raise NotRecordingError("this server does not record actions; set record_actions = true")
        if not actions:
            return np.zeros(len(Outcome), np.int64)
        known = _check(sequences, actions)
        users = np.array([a.user_id for a in actions], np.uint64)
        best = np.full(len(actions), len(Outcome))
        for sequence, (events, into) in zip(sequences, known, strict=True):
            if not len(into):
                continue
            try:
                outcomes = await sequence.writer.record(users[into], events)
            except QueueFullError as error:
                raise RecordingFullError(str(error), 1.0) from error
            except StoreError as error:
                raise StoreDownError(f"the actions may not have been stored; send them again: {error}") from error
            best[into] = np.minimum(best[into], outcomes)
        counts = np.bincount(best, minlength=len(Outcome))
        for outcome in Outcome:
            self._metrics.actions[outcome.name.lower()].inc(int(counts[outcome]))
        return counts


def _check(
    sequences: Sequence[_Sequence], actions: Sequence[activity_pb2.Action]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return by sequence the events that its group knows, structured[E], and their positions, int64[E].

    Raises:
        InvalidRequestError: names the first actions at fault.
    """
    now_ms = clock_ms()
    problems: list[FieldViolation] = []
    found: list[tuple[list[tuple[int, int, int, int, int]], list[int]]] = [([], []) for _ in sequences]
    for i, a in enumerate(actions):
        known = False
        for sequence, (events, into) in zip(sequences, found, strict=True):
            action, surface = sequence.actions.get(a.action), sequence.surfaces.get(a.surface)
            if action is not None and surface is not None:
                known = True
                events.append((a.pin_id, a.time_ms, a.event_id, action, surface))
                into.append(i)
        if not known:
            problems += _unknown(sequences, f"actions[{i}]", a)
        if a.event_id == 0:
            problems.append(FieldViolation(f"actions[{i}].event_id", "0; give every action an id of its own"))
        if problem := time_problem(a.time_ms, now_ms):
            problems.append(FieldViolation(f"actions[{i}].time_ms", problem))
        if len(problems) >= _VIOLATIONS_MAX:
            break
    if problems:
        raise InvalidRequestError(problems)
    return [(np.array(events, SequenceGroup.dtype), np.array(into, np.int64)) for events, into in found]


def _unknown(sequences: Sequence[_Sequence], where: str, action: activity_pb2.Action) -> list[FieldViolation]:
    names = sorted(set().union(*(sequence.actions for sequence in sequences)))
    surfaces = sorted(set().union(*(sequence.surfaces for sequence in sequences)))
    problems = []
    if action.action not in names:
        problems.append(
            FieldViolation(f"{where}.action", f"unknown action {action.action[:60]!r}; there are {', '.join(names)}")
        )
    if action.surface not in surfaces:
        problems.append(
            FieldViolation(
                f"{where}.surface", f"unknown surface {action.surface[:60]!r}; there are {', '.join(surfaces)}"
            )
        )
    return problems or [FieldViolation(where, f"no served model knows {action.action!r} on {action.surface!r}")]


async def _one(request: activity_pb2.RecordRequest) -> AsyncIterator[activity_pb2.RecordRequest]:
    yield request
