from __future__ import annotations

import asyncio

import grpc.aio
import numpy as np
import pytest

from loadtest.open_loop import DROPPED, OK, STAGES, open_loop, run, saturate, sender
from loadtest.workload import Workload
from pinrank.v1 import ranking_pb2
from tests.loadtest.virtual import now_s, run_virtual

SERVICE_S, STALL_S, GAP_S = 0.001, 0.5, 0.01


class OneAtATime:
    """A server with one worker, which stalls once."""

    def __init__(self, stalls_at: int | None = None) -> None:
        self._stalls_at = stalls_at
        self._turn = asyncio.Lock()
        self.sent_s: list[float] = []

    async def send(self, content: bytes) -> tuple[str, bytes]:
        number = len(self.sent_s)
        self.sent_s.append(now_s())
        async with self._turn:
            await asyncio.sleep(STALL_S if number == self._stalls_at else SERVICE_S)
        return OK, b""


def regular(count: int) -> np.ndarray:
    return np.arange(count) * GAP_S


def test_requests_due_during_a_stall_show_it_in_their_latency():
    async def main():
        server = OneAtATime(stalls_at=10)
        return server, await open_loop(server.send, [b""], regular(100), clock=now_s)

    server, samples = run_virtual(main())
    assert server.sent_s == pytest.approx(regular(100)), "the stall must hold no send back"
    assert samples.latency_s[:10] == pytest.approx(SERVICE_S)
    stall_ends = 10 * GAP_S + STALL_S
    waited = [max(stall_ends + (i - 10) * SERVICE_S - i * GAP_S, SERVICE_S) for i in range(10, 100)]
    assert samples.latency_s[10:] == pytest.approx(waited)
    assert np.count_nonzero(samples.latency_s > 0.1) > 40
    assert samples.late_s == pytest.approx(0)


def test_latency_counts_from_when_a_request_was_due_not_from_when_it_was_sent():
    async def main():
        async def send(content: bytes) -> tuple[str, bytes]:
            if content == b"0":  # the whole process stands still, and with it the generator
                asyncio.get_running_loop().now_s += STALL_S  # type: ignore[attr-defined]
            return OK, b""

        return await open_loop(send, [b"0", *[b"1"] * 99], regular(100), clock=now_s)

    samples = run_virtual(main())
    expected = np.maximum(STALL_S - regular(100), 0)
    assert samples.late_s[1:] == pytest.approx(expected[1:])
    assert samples.latency_s == pytest.approx(expected)


def test_closed_loop_hides_the_stall():
    async def main():
        server = OneAtATime(stalls_at=10)
        return await saturate(server.send, [b""], callers=1, warmup_s=0, duration_s=1, clock=now_s)

    samples = run_virtual(main())
    assert np.count_nonzero(samples.latency_s > 0.1) == 1


def test_requests_beyond_the_bound_are_dropped_openly():
    async def main():
        never = asyncio.Event()

        async def send(content: bytes) -> tuple[str, bytes]:
            if content == b"release":
                never.set()
            await never.wait()
            return OK, b""

        async def release() -> None:
            await asyncio.sleep(10)
            never.set()

        releasing = asyncio.create_task(release())
        samples = await open_loop(send, [b""], regular(10), in_flight_max=4, clock=now_s)
        await releasing
        return samples

    samples = run_virtual(main())
    assert samples.statuses == (OK,) * 4 + (DROPPED,) * 6
    assert np.isnan(samples.latency_s).tolist() == [False] * 4 + [True] * 6
    assert samples.due_s == pytest.approx(regular(10))


def test_samples_stand_in_the_order_they_were_due_and_can_leave_out_a_warm_up():
    async def main():
        async def send(content: bytes) -> tuple[str, bytes]:
            await asyncio.sleep(5 if content == b"slow" else 0)
            return content.decode(), b""

        return await open_loop(send, [b"slow", b"a", b"b", b"c"], regular(4), clock=now_s)

    samples = run_virtual(main())
    assert samples.statuses == ("slow", "a", "b", "c")
    later = samples.since(GAP_S * 1.5)
    assert later.statuses == ("b", "c")
    assert later.due_s == pytest.approx([GAP_S / 2, GAP_S * 1.5])


def test_answers_are_read_for_timings_and_degradation():
    timings = ranking_pb2.StageTimings(wire_us=1, fetch_us=2, score_us=5, total_us=9)
    answers = [
        ranking_pb2.RankResponse(pin_ids=[1], timings=timings),
        ranking_pb2.RankResponse(pin_ids=[1], degradation=ranking_pb2.Degradation(pins_missing=1)),
    ]

    async def main():
        async def send(content: bytes) -> tuple[str, bytes]:
            return OK, content

        return await open_loop(send, [a.SerializeToString() for a in answers], regular(2), clock=now_s)

    samples = run_virtual(main())
    assert samples.degraded.tolist() == [False, True]
    assert dict(zip(STAGES, samples.stage_us[0].tolist(), strict=True)) == {
        "wire": 1, "fetch": 2, "assemble": 0, "queue": 0, "score": 5, "utility": 0, "select": 0, "total": 9,
    }  # fmt: skip


def test_saturation_counts_what_was_answered_within_the_window():
    async def main():
        server = OneAtATime()
        return await saturate(server.send, [b""], callers=3, warmup_s=0.1, duration_s=1, clock=now_s)

    samples = run_virtual(main())
    assert len(samples.statuses) == pytest.approx(1 / SERVICE_S, abs=1)
    assert samples.latency_s == pytest.approx(3 * SERVICE_S)
    assert samples.due_s[0] < 0
    assert (samples.due_s + samples.latency_s <= 1 + 1e-9).all()


def test_a_failure_of_the_generator_itself_is_raised():
    async def main():
        async def send(content: bytes) -> tuple[str, bytes]:
            return OK, b"\xff no message"

        return await saturate(send, [b""], callers=2, warmup_s=0, duration_s=1, clock=now_s)

    with pytest.raises(ExceptionGroup):
        run_virtual(main())


def test_run_gives_back_the_result():
    async def main() -> int:
        return 7

    assert run(main()) == 7


@pytest.fixture
def requests() -> list[bytes]:
    ids = np.arange(1, 51, dtype=np.uint64)
    return list(Workload(ids[:4], ids, candidates=((16, 1.0),)).requests(20))


async def test_real_server_answers_every_request_undegraded(channel, requests):
    samples = await open_loop(sender(channel, deadline_s=10), requests, np.arange(40) * 1e-3)
    assert samples.statuses == (OK,) * 40
    assert not samples.degraded.any()
    assert (samples.stage_us[:, STAGES.index("total")] > 0).all()
    assert (samples.latency_s >= samples.stage_us[:, STAGES.index("total")] / 1e6).all()


async def test_real_refusals_and_missing_features_are_recorded(channel):
    contents = [
        ranking_pb2.RankRequest(user_id=1, pin_ids=[1], surface="nowhere").SerializeToString(),
        ranking_pb2.RankRequest(user_id=999, pin_ids=[1], surface="home").SerializeToString(),
    ]
    samples = await open_loop(sender(channel, deadline_s=10), contents, np.zeros(2))
    assert samples.statuses == ("INVALID_ARGUMENT", OK)
    assert samples.degraded.tolist() == [False, True]


async def test_a_call_ends_at_its_deadline(requests: list[bytes]) -> None:
    async def stall(content: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await asyncio.Event().wait()
        return b""

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(stall)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("pinrank.v1.RankingService", {"Rank": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            samples = await open_loop(sender(channel, deadline_s=0.02), requests, np.zeros(3))
    finally:
        await server.stop(None)
    assert samples.statuses == ("DEADLINE_EXCEEDED",) * 3


async def test_real_server_is_saturated_by_concurrent_callers(channel, requests):
    samples = await saturate(sender(channel, deadline_s=10), requests, callers=4, warmup_s=0.05, duration_s=0.2)
    assert set(samples.statuses) == {OK}
    assert not samples.degraded.any()
    assert samples.generator_cores > 0
