"""The example of deploy/envoy: a real Envoy in front of two real servers."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import stat
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from uuid import uuid4

import grpc
import grpc.aio
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest

from pinrank.channels import open_aio_channel, open_channel
from pinrank.tls import ClientTls
from pinrank.v1 import activity_pb2, models_pb2, ranking_pb2
from tests.certificates import Authority
from tests.proxied import NAME, proxied, until, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

RANK, STATUS, RECORD = (
    "/pinrank.v1.RankingService/Rank", "/pinrank.v1.ModelService/Status", "/pinrank.v1.ActivityService/Record",
)  # fmt: skip
REQUESTS = {
    RANK: ranking_pb2.RankRequest(user_id=1, pin_ids=range(1, 11), surface="home").SerializeToString(),
    STATUS: models_pb2.StatusRequest().SerializeToString(),
    RECORD: activity_pb2.RecordRequest().SerializeToString(),
}
CONNECTIONS_MAX = 30
PAUSE_S = 0.01


@pytest.fixture(scope="module", params=["native", "grpcio"])
def behind(request, model_store, tmp_path_factory):
    """Two servers behind an Envoy that takes few connections, so that a test can open too many."""
    given = (
        f'model_store = "{model_store}"\nmodel = "tiny"\nlabels = ["stable"]\nfeature_store = "memory://"\n'
        f'grpc_edge = "{request.param}"\nlame_duck_s = 2\nrecord_actions = true\ncandidates_max = 100\n'
        "engine_streams = 1\n"
    )
    changes = {"max_active_downstream_connections: 10000": f"max_active_downstream_connections: {CONNECTIONS_MAX}"}
    with proxied(tmp_path_factory.mktemp("envoy"), given, changes) as found:
        yield found


def call(behind, caller, method=RANK, metadata=(), content=None, timeout_s=20.0):
    """Return the status of a call with its text, and its trailing metadata."""
    tls = caller if isinstance(caller, ClientTls) else behind.client(caller)
    with open_channel(behind.address, tls=tls) as channel:
        content = REQUESTS[method] if content is None else content
        made = channel.unary_unary(method).future(content, timeout=timeout_s, metadata=metadata)
        return made.code().name, made.details() or "", dict(made.trailing_metadata() or ())


def logged(behind, calls):
    """Call, and return what was found with the lines of these calls: those between two calls that have no route.

    Envoy has one thread here, which logs calls as they end; no other calls are made meanwhile.
    """
    first, last = (f"/tests/{uuid4()}" for _ in range(2))
    call(behind, "feed", first, content=b"")
    found = calls()
    call(behind, "feed", last, content=b"")
    lines = behind.envoy.access_log(last)
    methods = [line["method"] for line in lines]
    return found, lines[methods.index(first) + 1 : methods.index(last)]


def test_calls_pass_with_a_certificate_and_nobody_else_connects(behind, tmp_path):
    assert call(behind, "feed")[0] == "OK"
    stranger = Authority(tmp_path / "stranger").client()
    for tls in (
        ClientTls(str(behind.authority.file), name=NAME),
        ClientTls(str(behind.authority.file), stranger.certificate, stranger.key, NAME),
    ):
        assert call(behind, tls)[0] == "UNAVAILABLE"


def test_calls_go_to_the_servers_in_turn_and_the_log_says_whose_they_were(behind):
    found, lines = logged(behind, lambda: [call(behind, "feed")[0] for _ in range(10)])
    assert found == ["OK"] * 10
    assert Counter(line["server"] for line in lines) == {f"127.0.0.1:{one.grpc_port}": 5 for one in behind.servers}
    assert {(line["caller"], line["method"], line["grpc_status"], line["attempts"]) for line in lines} == {
        ("spiffe://tests/feed", RANK, "OK", 1)
    }


def test_permissions_are_those_of_the_real_caller(behind):
    found = {
        (caller, method): call(behind, caller, method)[0]
        for caller in ("feed", "operator", "nobody") for method in (RANK, RECORD, STATUS)
    }  # fmt: skip
    assert found == {
        ("feed", RANK): "OK", ("feed", RECORD): "OK", ("feed", STATUS): "PERMISSION_DENIED",
        ("operator", RANK): "PERMISSION_DENIED", ("operator", RECORD): "PERMISSION_DENIED", ("operator", STATUS): "OK",
        ("nobody", RANK): "UNAUTHENTICATED", ("nobody", RECORD): "UNAUTHENTICATED",
        ("nobody", STATUS): "UNAUTHENTICATED",
    }  # fmt: skip


@pytest.mark.parametrize("names", [["operator"], ["spiffe://tests/operator"], ["operator", "operator"], ["", "feed"]])
def test_a_client_cannot_say_that_it_is_somebody_else(behind, names):
    metadata = tuple(("x-pinrank-caller", name) for name in names)
    code, text, _ = call(behind, "feed", STATUS, metadata)
    assert (code, "caller 'feed' may not models" in text) == ("PERMISSION_DENIED", True), text
    # Neither can one whose certificate has no name that Envoy passes on.
    own = behind.authority.client("without", common="operator")
    code, text, _ = call(
        behind, ClientTls(str(behind.authority.file), own.certificate, own.key, NAME), STATUS, metadata
    )
    assert (code, "x-pinrank-caller '', which 'envoy' sends" in text) == ("UNAUTHENTICATED", True), text


def test_a_refusal_reaches_the_caller_with_its_pushback_and_is_not_retried(behind):
    # These ask Envoy to retry it all the same.
    metadata = (("x-envoy-retry-grpc-on", "resource-exhausted"), ("x-envoy-max-retries", "5"))
    before = retried(behind)
    found, lines = logged(behind, lambda: [call(behind, "limited", metadata=metadata) for _ in range(8)])
    # The quota is each server's own.
    assert [code for code, _, _ in found] == ["OK"] * 6 + ["RESOURCE_EXHAUSTED"] * 2
    for _, text, trailers in found[6:]:
        assert "caller 'limited' has used its quota" in text
        assert trailers["grpc-retry-pushback-ms"] == "-1"
    assert retried(behind) == before
    assert [(line["caller"], line["grpc_status"], line["attempts"]) for line in lines] == [
        ("spiffe://tests/limited", status, 1) for status in ["OK"] * 6 + ["ResourceExhausted"] * 2
    ]


def retried(behind):
    return behind.envoy.statistics()["cluster.pinrank.upstream_rq_retry"]


class RawClient:
    """A client of h2, which sends whatever it is told. It is open until its `with` block ends."""

    def __init__(self, behind):
        context = behind.client("feed").context()
        context.check_hostname = False
        plain = socket.create_connection(("127.0.0.1", behind.envoy.port), timeout=20)
        self.own = context.wrap_socket(plain, server_hostname=NAME)
        self.h2 = h2.connection.H2Connection()
        self.h2.initiate_connection()
        self.send()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.own.close()

    def begin(self, content=b"", headers=(), *, end=True, method=RANK):
        stream = self.h2.get_next_available_stream_id()
        own = [(":method", "POST"), (":scheme", "https"), (":path", method), (":authority", NAME), ("te", "trailers"),
               ("content-type", "application/grpc")]  # fmt: skip
        self.h2.send_headers(stream, own + list(headers))
        if content:
            self.h2.send_data(stream, content)
        if end:
            self.h2.end_stream(stream)
        return stream

    def send(self):
        self.own.sendall(self.h2.data_to_send())

    def events(self):
        """Yield what comes until the connection ends."""
        try:
            while content := self.own.recv(1 << 16):
                yield from self.h2.receive_data(content)
                self.send()
        except (ConnectionResetError, BrokenPipeError, ssl.SSLError):
            pass


def test_calls_begun_only_to_be_ended_end_the_connection_and_no_others(behind):
    counter = "http.grpc.downstream_rq_too_many_premature_resets"
    before = behind.envoy.statistics()[counter]
    with open_channel(behind.address, tls=behind.client("feed")) as channel:
        rank = channel.unary_unary(RANK)
        rank(REQUESTS[RANK], timeout=20)
        with RawClient(behind) as attacker, pytest.raises((OSError, ssl.SSLError)):  # noqa: PT012 - in one of the sends
            for number in range(20_000):
                attacker.h2.reset_stream(attacker.begin(end=False), h2.errors.ErrorCodes.CANCEL)
                attacker.send()
                if number % 100 == 99:
                    rank(REQUESTS[RANK], timeout=20)
        rank(REQUESTS[RANK], timeout=20)
    assert behind.envoy.statistics()[counter] == before + 1


def test_connections_beyond_the_limit_are_closed_and_those_before_go_on(behind):
    with open_channel(behind.address, tls=behind.client("feed")) as channel:
        rank = channel.unary_unary(RANK)
        rank(REQUESTS[RANK], timeout=20)
        with ExitStack() as stack:
            waited = select.poll()
            for _ in range(2 * CONNECTIONS_MAX):
                opened = stack.enter_context(socket.create_connection(("127.0.0.1", behind.envoy.port)))
                waited.register(opened, select.POLLIN)
            # Envoy says nothing before a client does: what can be read is the end of the connection.
            until(lambda: len(waited.poll(0)) >= CONNECTIONS_MAX)
            assert len(waited.poll(0)) < 2 * CONNECTIONS_MAX
            rank(REQUESTS[RANK], timeout=20)
    until(lambda: behind.envoy.statistics()["http.grpc.downstream_cx_active"] == 0)
    assert call(behind, "feed")[0] == "OK"


def test_a_request_that_does_not_end_reaches_no_server(behind):
    before = behind.envoy.statistics()["cluster.pinrank.upstream_rq_total"]
    with RawClient(behind) as client:
        stream = client.begin(struct.pack(">BI", 0, len(REQUESTS[RANK])) + REQUESTS[RANK][:-1], end=False)
        client.send()
        until(lambda: behind.envoy.statistics()["http.grpc.downstream_rq_active"] == 1)
        assert call(behind, "feed")[0] == "OK"
        assert behind.envoy.statistics()["cluster.pinrank.upstream_rq_total"] == before + 1
        client.h2.send_data(stream, REQUESTS[RANK][-1:], end_stream=True)
        client.send()
        found = next(event for event in client.events() if isinstance(event, h2.events.TrailersReceived))
        assert (b"grpc-status", b"0") in found.headers


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ((("a", "x" * 9_000),), REQUESTS[RANK], "INTERNAL"),
        (tuple((f"a{number}", "x") for number in range(100)), REQUESTS[RANK], "INTERNAL"),
        ((), b"x" * (2 << 20), "UNKNOWN"),
    ],
    ids=["long headers", "many headers", "large message"],
)
def test_what_is_too_large_reaches_no_server(behind, headers, content, status):
    before = behind.envoy.statistics()["cluster.pinrank.upstream_rq_total"]
    assert call(behind, "feed", metadata=headers, content=content)[0] == status
    assert behind.envoy.statistics()["cluster.pinrank.upstream_rq_total"] == before
    assert call(behind, "feed")[0] == "OK"


def test_a_connection_may_have_a_thousand_calls_at_once(behind):
    with RawClient(behind) as client:
        next(event for event in client.events() if isinstance(event, h2.events.RemoteSettingsChanged))
        assert client.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] == 1_000


def test_only_envoys_user_reaches_its_admin_page(behind):
    assert stat.S_IMODE(behind.envoy.admin.stat().st_mode) == 0o600


def test_calls_that_miss_their_deadlines_take_no_server_out(behind):
    """Unlike gRPC's own clients, this one does not hang up at its deadline, so that Envoy sees the servers' answers."""
    ejections = "cluster.pinrank.outlier_detection.ejections_enforced_total"
    before = behind.envoy.statistics()[ejections]
    message = struct.pack(">BI", 0, len(REQUESTS[RANK])) + REQUESTS[RANK]
    statuses = Counter()
    with RawClient(behind) as client:
        answers = (dict(event.headers) for event in client.events() if hasattr(event, "headers"))
        for _ in range(40):  # one after the other: Envoy looks at failures in a row
            client.begin(message, [("grpc-timeout", "100u")])
            client.send()
            statuses[next(one[b"grpc-status"] for one in answers if b"grpc-status" in one)] += 1
    assert statuses[b"4"] > 30
    assert behind.envoy.statistics()[ejections] == before
    assert behind.envoy.healthy() == 2


def test_a_large_request_survives_its_server_too(behind):
    before = retried(behind)
    behind.servers[1].kill()
    # Larger than what Envoy reads ahead, and nothing that a server could parse: which the living one says.
    found = [call(behind, "feed", content=b"x" * 900_000)[0] for _ in range(2)]
    behind.servers[1].start()
    until(lambda: behind.envoy.healthy() == 2)
    assert found == ["INVALID_ARGUMENT"] * 2
    assert retried(behind) > before, "one of two in turn was for the dead one"


def test_after_five_failures_a_dead_server_gets_no_calls(behind):
    ejections = "cluster.pinrank.outlier_detection.ejections_enforced_consecutive_local_origin_failure"
    before = behind.envoy.statistics()[ejections]
    with open_channel(behind.address, tls=behind.client("feed")) as channel:
        rank = channel.unary_unary(RANK)
        rank(REQUESTS[RANK], timeout=20)
        behind.servers[1].kill()
        for _ in range(10):  # sooner than the second health check
            rank(REQUESTS[RANK], timeout=20)
    assert behind.envoy.statistics()[ejections] == before + 1
    retries = retried(behind)
    assert [call(behind, "feed")[0] for _ in range(10)] == ["OK"] * 10
    assert retried(behind) == retries
    behind.servers[1].start()
    until(lambda: behind.envoy.healthy() == 2)


async def load(behind, callers, stopped):
    """Call by so many callers until `stopped` is done, half of which retry as well; return the calls by status."""
    codes = Counter()

    async def calls(rank):
        while not stopped.done():
            try:
                await rank(REQUESTS[RANK], timeout=20)
                codes["OK"] += 1
                await asyncio.sleep(PAUSE_S)  # leaves the processor to the servers that start
            except grpc.aio.AioRpcError as error:
                codes[error.code().name + " " + (error.details() or "")] += 1

    tls = behind.client("feed")
    async with (
        open_aio_channel(behind.address, tls=tls) as plain,
        open_aio_channel(behind.address, retry=True, tls=tls) as retrying,
    ):
        channels = [plain, retrying] * (callers // 2)
        await asyncio.gather(*(calls(channel.unary_unary(RANK)) for channel in channels))
    return codes


async def under_load(behind, act, callers=4):
    """Return the calls by status while something is done in another thread."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as pool:
        done = loop.run_in_executor(pool, act)
        codes = await load(behind, callers, done)
        await done
    return codes


async def test_a_server_that_is_killed_costs_no_call(behind):
    before = retried(behind)

    def kill():
        until(lambda: behind.envoy.statistics()["cluster.pinrank.upstream_rq_active"] > 0)
        behind.servers[0].kill()
        until(lambda: behind.envoy.healthy() == 1)
        behind.servers[0].start()
        until(lambda: behind.envoy.healthy() == 2)

    codes = await under_load(behind, kill)
    assert set(codes) == {"OK"}
    assert retried(behind) > before, "Envoy sent calls to it that it could not answer"


async def test_a_rolling_restart_under_load_costs_no_call(behind):
    def restart():
        for server in behind.servers:
            server.stop()
            until(lambda: behind.envoy.healthy() == 1)
            server.start()
            until(lambda: behind.envoy.healthy() == 2)

    codes = await under_load(behind, restart)
    assert set(codes) == {"OK"}
    assert codes["OK"] > 1_000
