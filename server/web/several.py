"""One HTTP port for several server processes: their parent asks them, and answers for all."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from server.config_sections import HttpConfig
from server.web.channel import Gone, Reply, Silent, ask
from server.web.http_port import Answer
from server.web.pages import MetricsPage, Verdict, probe
from server.web.sums import Sums

#: Longest times that a process may take to answer a probe, which itself often has a second, and to show its metrics.
_PROBE_S, _METRICS_S = 0.75, 2.0
#: Probes within this time of one another share the answers of the processes, however many there are.
_SHARED_S = 0.2

Replies = list[tuple["_Member", Reply | Gone | Silent]]


@dataclass(slots=True)
class _Member:
    """One of the processes.

    Attributes:
        channel: our end of the channel to it.
        number: from 0 to the number of processes - 1.
        turn: how many processes with this number there were before.
        answered: whether it has answered at least once.
        started: whether it has said that its start has ended.
    """

    channel: socket.socket
    number: int
    turn: int
    answered: bool = False
    started: bool = False

    def line(self, text: str) -> str:
        return f"process {self.number}: {text}"


class SeveralProcesses:
    """Answers for several processes. `add` may be called by any thread, everything else by the HTTP port's loop."""

    def __init__(self, limits: HttpConfig) -> None:
        self._members: dict[int, _Member] = {}
        #: Channels to processes that have ended; only the HTTP port's loop, which may be using one, closes them.
        self._replaced: list[socket.socket] = []
        self._metrics = MetricsPage(self._families, limits.metrics_age_s_max)
        self._sums = Sums()
        #: When processes were asked for a path, on the monotonic clock, and what they answered.
        self._asked: dict[str, tuple[float, asyncio.Task[Replies]]] = {}
        self._started = False

    def add(self, number: int) -> socket.socket:
        """Return the end of the channel for a new process, which takes the place of an ended one with its number."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)  # noqa: FBT003 - the standard library's
        before = self._members.get(number)
        self._members[number] = _Member(ours, number, before.turn + 1 if before else 0)
        if before:
            self._replaced.append(before.channel)
        return theirs

    def pages(self) -> Mapping[str, Answer]:
        """Return the pages by their paths."""
        judges = {"/livez": self.live, "/readyz": self.ready, "/startupz": self.startup, "/healthz": self.health}
        return {"/metrics": self._metrics.answer} | {path: probe(judge) for path, judge in judges.items()}

    async def live(self) -> Verdict:
        """Judge that no process has an event loop that hangs. One that is starting is up to `/startupz`."""
        reasons = []
        for member, reply in await self._ask("/livez"):
            if isinstance(reply, Reply) and reply.status != 200:
                reasons.append(member.line(", ".join(reply.body.splitlines())))
            elif isinstance(reply, Silent) and member.answered:
                reasons.append(member.line(f"no answer within {_PROBE_S:g} s"))
        return Verdict(good=not reasons, lines=("not alive" if reasons else "alive", *reasons))

    async def startup(self) -> Verdict:
        """Judge whether every process has started once; one that dies later starts again without a probe's help."""
        if not self._started:
            replies = await self._ask("/startupz")
            self._started = all(member.started for member, _ in replies)
            if not self._started:
                return Verdict(good=False, lines=("starting", *_lines(replies)))
        return Verdict(good=True, lines=("started",))

    async def ready(self) -> Verdict:
        return await self._readiness("/readyz", "ready", "not ready")

    async def health(self) -> Verdict:
        return await self._readiness("/healthz", "serving", "not serving")

    async def _readiness(self, path: str, yes: str, no: str) -> Verdict:
        """Judge that every process is ready, but for those that start again after a death, and at least one."""
        asked, startups = await asyncio.gather(self._ask(path), self._ask("/startupz"))
        again = {member.number for member, _ in startups if member.turn and not member.started}
        again |= {member.number for member, reply in asked if isinstance(reply, Gone)}
        ready = {member.number for member, reply in asked if isinstance(reply, Reply) and reply.status == 200}
        good = bool(ready) and ready | again == {member.number for member, _ in asked}
        return Verdict(good, (yes if good else no, *_lines(asked)))

    async def _ask(self, path: str) -> Replies:
        """Ask all processes for a probe, or share what they have just answered."""
        now_s = time.monotonic()
        asked_s, replies = self._asked.get(path, (-math.inf, None))
        if replies is None or now_s - asked_s >= _SHARED_S:
            replies = asyncio.get_running_loop().create_task(self._replies(path, _PROBE_S))
            self._asked[path] = now_s, replies
        return await asyncio.shield(replies)

    async def _replies(self, path: str, within_s: float) -> Replies:
        while self._replaced:
            self._replaced.pop().close()
        members = list(self._members.values())
        replies = await asyncio.gather(*(ask(member.channel, path, within_s) for member in members))
        for member, reply in zip(members, replies, strict=True):
            if isinstance(reply, Reply):
                member.answered = True
                member.started |= path == "/startupz" and reply.status == 200
        return list(zip(members, replies, strict=True))

    async def _families(self) -> AsyncIterator[Metric]:
        shown = {}
        for member, reply in await self._replies("/metrics", _METRICS_S):
            if isinstance(reply, Reply) and reply.status == 200:
                shown[member.number, member.turn] = list(text_string_to_metric_families(reply.body))
                await asyncio.sleep(0)  # so that a probe need not wait for all of them
        members = list(self._members.values())
        running = {(member.number, member.turn) for member in members}
        for family in self._sums.page(shown, running):
            yield family
        up = GaugeMetricFamily(
            "pinrank_process_up", "1 for each of several server processes that showed its metrics", labels=["process"]
        )
        restarts = CounterMetricFamily(
            "pinrank_process_restarts", "Starts in the place of one of several processes that died", labels=["process"]
        )
        for member in members:
            up.add_metric([str(member.number)], (member.number, member.turn) in shown)
            restarts.add_metric([str(member.number)], member.turn)
        yield up
        yield restarts


def _lines(replies: Replies) -> list[str]:
    """Return what each process said, line by line."""
    found = []
    for member, reply in replies:
        match reply:
            case Reply(_, body):
                found += [member.line(line) for line in body.splitlines()]
            case Gone():
                found.append(member.line("has ended, and is started again"))
            case Silent():
                found.append(member.line(f"no answer within {_PROBE_S:g} s" if member.answered else "starting"))
    return found
