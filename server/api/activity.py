"""`pinrank.v1.ActivityService`: checks users' actions and writes them into the sequences that served models read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import compress
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np

from feature_client.action_times import clock_ms, time_problem
from feature_client.activity.writer import ActionOutcome, QueueFullError
from feature_client.groups import SequenceGroup
from feature_client.stores.store import StoreError
from pinrank.v1 import activity_pb2
from server.access.callers import Permission
from server.access.gate import CALLER, Gate
from server.api.draining import Calls
from server.api.status import listed, within
from server.config import ServerConfig
from server.errors import (
    FieldViolation,
    InvalidRequestError,
    NotRecordingError,
    RecordingFullError,
    StoreDownError,
)
from server.request.recording import RecordedSequence, Recording
from server.telemetry.metrics import ActionMetrics

if TYPE_CHECKING:
    from server.api.calls import Methods
    from server.request.answer_log import AnswerLog

SERVICE = "pinrank.v1.ActivityService"
_VIOLATIONS_MAX = 10
_SHOWN_MAX = 100
#: Check this many actions (half a millisecond), then yield to the event loop.
_SLICE = 256
#: When a caller whose actions were all refused should send them again.
_RETRY_S = 1.0

_Context = grpc.aio.ServicerContext[activity_pb2.RecordRequest, activity_pb2.RecordResponse]


class ActivityEdge:
    """Answers Record calls. Each served model's sequence receives the actions that its vocabularies contain."""

    def __init__(
        self,
        metrics: ActionMetrics,
        calls: Calls,
        recording: Recording,
        log: AnswerLog | None,
        gate: Gate,
        config: ServerConfig,
    ) -> None:
        self._log = log
        self._metrics = metrics
        self._calls = calls
        self._recording = recording
        self._gate = gate
        self._actions_max = config.record_actions_max

    def methods(self) -> Methods:
        parse, serialise = activity_pb2.RecordRequest.FromString, activity_pb2.RecordResponse.SerializeToString
        return {
            "Record": grpc.unary_unary_rpc_method_handler(self.record, parse, serialise),
            "RecordStream": grpc.stream_unary_rpc_method_handler(self.record_stream, parse, serialise),
        }

    async def record(self, request: activity_pb2.RecordRequest, context: _Context) -> activity_pb2.RecordResponse:
        self._calls.take(context)
        return await self._answer(_one(request))

    async def record_stream(
        self, requests: AsyncIterator[activity_pb2.RecordRequest], context: _Context
    ) -> activity_pb2.RecordResponse:
        return await self._answer(self._permitted(requests, context))

    async def _permitted(
        self, requests: AsyncIterator[activity_pb2.RecordRequest], context: _Context
    ) -> AsyncIterator[activity_pb2.RecordRequest]:
        """Yield a stream's messages as long as its caller may record: a stream may outlive a token."""
        async for request in requests:
            self._gate.check(context, Permission.RECORD)
            yield request

    async def _answer(self, requests: AsyncIterator[activity_pb2.RecordRequest]) -> activity_pb2.RecordResponse:
        caller = CALLER.get()
        counts = np.zeros(len(ActionOutcome), np.int64)
        async for request in requests:
            if len(request.actions) > self._actions_max:
                problem = f"{len(request.actions)} actions; send at most {self._actions_max} at a time"
                raise InvalidRequestError([FieldViolation("actions", problem)])
            self._gate.charge(caller, "actions", max(1, len(request.actions)))  # an empty message costs something, too
            counts += await self._store(request.actions)
        new_users, too_many = counts[ActionOutcome.REFUSED_NEW_USER], counts[ActionOutcome.REFUSED_TOO_MANY]
        if 0 < new_users + too_many == counts.sum():
            raise RecordingFullError(self._refusal(new_users, too_many), _RETRY_S)
        return activity_pb2.RecordResponse(
            added=counts[ActionOutcome.ADDED],
            repeated_actions=counts[ActionOutcome.REPEATED],
            too_old=counts[ActionOutcome.TOO_OLD],
            refused_new_users=new_users,
            refused_too_many=too_many,
        )

    def _refusal(self, new_users: int, too_many: int) -> str:
        rules = self._recording.rules
        parts = []
        if new_users:
            parts.append(
                f"{new_users} actions are of users without a sequence, and the server admits no more now "
                f"(record_new_users_per_s = {rules.new_users_per_s:g}, record_values_max = {rules.values_max})"
            )
        if too_many:
            parts.append(
                f"{too_many} actions are of users with too many new ones "
                f"(record_user_actions_per_s = {rules.user_actions_per_s:g})"
            )
        return f"{'; '.join(parts)}; nothing was stored, send the call again later"

    async def _store(self, actions: Sequence[activity_pb2.Action]) -> np.ndarray:
        """Store actions in every sequence whose vocabularies contain them.

        Returns:
            int64[5], the number of actions by `ActionOutcome`; an action counts once, with its best outcome.
        """
        self._calls.check()
        sequences = self._recording.sequences
        if not sequences:
            raise NotRecordingError("this server does not record actions; set record_actions = true")
        if not actions:
            return np.zeros(len(ActionOutcome), np.int64)
        users, known = await checked_actions(sequences, actions, self._recording.rules.lasts_s)
        best = np.full(len(actions), len(ActionOutcome))
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
        stored = best < ActionOutcome.REFUSED_NEW_USER
        if self._log is not None and stored.any():
            self._log.recorded(actions if stored.all() else list(compress(actions, stored)), clock_ms())
        counts = np.bincount(best, minlength=len(ActionOutcome))
        for outcome in ActionOutcome:
            self._metrics.outcomes[outcome].inc(int(counts[outcome]))
        return counts


async def checked_actions(
    sequences: Sequence[RecordedSequence], actions: Sequence[activity_pb2.Action], lasts_s: float | None = None
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Check a call's actions, and yield to the event loop after every `_SLICE` of them.

    No action may be older than `lasts_s`; None is any age.

    Returns:
        uint64[E], the users; and for each sequence the events that its vocabularies contain, structured[K], with their
        positions in `actions`, int64[K].

    Raises:
        InvalidRequestError: lists the first problems, and says how many more there are.
    """
    now_ms = clock_ms()
    users = np.zeros(len(actions), np.uint64)
    found: list[tuple[list[tuple[int, int, int, int, int]], list[int]]] = [([], []) for _ in sequences]
    problems: list[FieldViolation] = []
    more = 0
    for start in range(0, len(actions), _SLICE):
        if start:
            await asyncio.sleep(0)
        for i, a in enumerate(actions[start : start + _SLICE], start):
            users[i] = a.user_id
            known = False
            for sequence, (events, into) in zip(sequences, found, strict=True):
                action, surface = sequence.actions.get(a.action), sequence.surfaces.get(a.surface)
                if action is not None and surface is not None:
                    known = True
                    events.append((a.pin_id, a.time_ms, a.event_id, action, surface))
                    into.append(i)
            unnamed = not a.request_id and a.HasField("position")
            if not known or a.event_id == 0 or unnamed or time_problem(a.time_ms, now_ms, lasts_s):
                of_one = _problems(sequences, f"actions[{i}]", a, now_ms, lasts_s, known=known)
                room = max(0, _VIOLATIONS_MAX - len(problems))
                problems += of_one[:room]
                more += len(of_one[room:])
    if problems:
        raise InvalidRequestError(problems, more)
    return users, [(np.array(events, SequenceGroup.dtype), np.array(into, np.int64)) for events, into in found]


def _problems(
    sequences: Sequence[RecordedSequence],
    where: str,
    action: activity_pb2.Action,
    now_ms: int,
    lasts_s: float | None,
    *,
    known: bool,
) -> list[FieldViolation]:
    problems = [] if known else _unknown(sequences, where, action)
    if action.event_id == 0:
        problems.append(FieldViolation(f"{where}.event_id", "0; give every action a unique id"))
    if not action.request_id and action.HasField("position"):
        problems.append(
            FieldViolation(f"{where}.position", "the position is in no answer; send its request_id, or no position")
        )
    if problem := time_problem(action.time_ms, now_ms, lasts_s):
        problems.append(FieldViolation(f"{where}.time_ms", problem))
    return problems


def _unknown(sequences: Sequence[RecordedSequence], where: str, action: activity_pb2.Action) -> list[FieldViolation]:
    problems = []
    for field, name, vocabularies in (
        ("action", action.action, [sequence.actions for sequence in sequences]),
        ("surface", action.surface, [sequence.surfaces for sequence in sequences]),
    ):
        if not any(name in vocabulary for vocabulary in vocabularies):
            known = listed(sorted(set().union(*vocabularies)))
            problems.append(
                FieldViolation(f"{where}.{field}", f"unknown {field} {within(name, _SHOWN_MAX)!r}; known: {known}")
            )
    shown = f"{within(action.action, _SHOWN_MAX)!r} on {within(action.surface, _SHOWN_MAX)!r}"
    return problems or [FieldViolation(where, f"no served model reads {shown}")]


async def _one(request: activity_pb2.RecordRequest) -> AsyncIterator[activity_pb2.RecordRequest]:
    yield request
