"""Who gets in, by calls to a real server on both kinds of gRPC port."""

from __future__ import annotations

import hashlib
import json
import time

import grpc
import grpc.aio
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pinrank.v1 import activity_pb2, impressions_pb2, models_pb2, ranking_pb2
from tests.conftest import eventually
from tests.server.swapping import TOKEN

FEED, WRITER, OPERATOR = "of-the-feed", "of-the-writer", "of-the-operator"


def section(name, token, may, more=""):
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f'[callers.{name}]\ntokens_sha256 = ["{digest}"]\nmay = {json.dumps(may)}\n{more}\n'


NAMED = (
    section("feed", FEED, ["rank", "seen"])
    + section("writer", WRITER, ["record"])
    + section("operator", OPERATOR, ["models", "reflection"])
)


@pytest.fixture(params=["native", "grpcio"])
async def behind(request, serve, tmp_path):
    """Start a server behind a gate, and return it and a function that calls it as somebody."""
    channels = []

    async def start(callers=NAMED, **changes):
        (tmp_path / "callers.toml").write_text(callers)
        settings = {"callers_file": tmp_path / "callers.toml", "grpc_edge": request.param, "callers_reload_s": 0.05}
        server = await serve(**settings | changes)
        channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}"))
        return server, lambda method, message=None, token=None: call(channels[-1], method, message, token)

    yield start
    for channel in channels:
        await channel.close()


MESSAGES = {
    "RankingService/Rank": ranking_pb2.RankRequest(user_id=1, pin_ids=range(1, 11), surface="home"),
    "ActivityService/Record": activity_pb2.RecordRequest(),
    "ImpressionService/Seen": impressions_pb2.SeenRequest(request_id=1, positions=[0]),
    "ModelService/Status": models_pb2.StatusRequest(),
}


async def call(channel, method, message=None, token=None):
    """Return the status of a call with its text, and its trailing metadata."""
    message = MESSAGES[method] if message is None else message
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    made = channel.unary_unary(f"/pinrank.v1.{method}")(message.SerializeToString(), timeout=20, metadata=metadata)
    return (await made.code()).name, await made.details() or "", dict(await made.trailing_metadata())


def counted(server, caller, outcome):
    return server.metrics.value("pinrank_caller_calls_total", caller=caller, outcome=outcome) or 0


async def test_each_caller_may_what_the_file_says_and_nothing_else(behind):
    server, call = await behind()
    allowed = {"RankingService/Rank": FEED, "ActivityService/Record": WRITER, "ModelService/Status": OPERATOR}
    for method, owner in allowed.items():
        for token in (FEED, WRITER, OPERATOR):
            code, text, _ = await call(method, token=token)
            if token == owner:
                assert code in ("OK", "FAILED_PRECONDITION"), text  # Record: this server records nothing
            else:
                assert code == "PERMISSION_DENIED"
                assert "the server's callers_file says who may" in text
    assert (await call("ImpressionService/Seen", token=WRITER))[0] == "PERMISSION_DENIED"
    assert (await call("ImpressionService/Seen", token=FEED))[0] == "FAILED_PRECONDITION", "there is no log"
    assert counted(server, "feed", "denied") == 2
    assert counted(server, "feed", "admitted") == 2


async def test_a_label_or_version_is_named_only_by_who_may(behind):
    """Calls that name a canary's label are judged by its guard, which moves labels in the model store."""
    named = []
    for choice in ({"label": "stable"}, {"version": 1}):
        named.append(ranking_pb2.RankRequest())
        named[-1].CopyFrom(MESSAGES["RankingService/Rank"])
        named[-1].MergeFrom(ranking_pb2.RankRequest(**choice))
    server, call = await behind(NAMED + section("tester", "of-the-tester", ["rank", "labels"]))
    for message in named:
        code, text, _ = await call("RankingService/Rank", message, token=FEED)
        assert (code, "caller 'feed' may not labels" in text) == ("PERMISSION_DENIED", True)
    assert counted(server, "feed", "denied") == 2
    for message in named:
        assert (await call("RankingService/Rank", message, token="of-the-tester"))[0] == "OK"


@pytest.mark.parametrize("token", ["", "wrong", FEED[:-1], FEED + "x", "a.b.c"])
async def test_a_wrong_token_is_no_caller_and_never_counts_as_none(behind, token):
    server, call = await behind('[anonymous]\nmay = ["rank"]\n' + NAMED)
    assert (await call("RankingService/Rank"))[0] == "OK"
    code, text, _ = await call("RankingService/Rank", token=token)
    assert code == "UNAUTHENTICATED"
    assert FEED not in text
    assert counted(server, "unknown", "unauthenticated") == 1


async def test_without_an_identity_a_call_is_told_what_to_send(behind):
    _, call = await behind()
    code, text, _ = await call("RankingService/Rank")
    assert code == "UNAUTHENTICATED"
    assert "send `authorization: Bearer TOKEN` as metadata, or a client certificate" in text


async def test_what_the_anonymous_may_is_said_in_the_file(behind):
    _, call = await behind('[anonymous]\nmay = ["rank"]\n' + NAMED)
    assert (await call("RankingService/Rank"))[0] == "OK"
    assert (await call("ImpressionService/Seen"))[0] == "PERMISSION_DENIED"
    assert (await call("ModelService/Status"))[0] == "UNAUTHENTICATED"


async def test_the_token_of_the_server_manages_models_and_ranks_nothing(behind):
    _, call = await behind()
    assert (await call("ModelService/Status", token=TOKEN))[0] == "OK"
    assert (await call("RankingService/Rank", token=TOKEN))[0] == "PERMISSION_DENIED"


async def test_a_server_without_a_file_lets_everybody_do_all_but_manage_models(serve):
    server = await serve()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        assert (await call(channel, "RankingService/Rank", token="of some proxy"))[0] == "OK"
        assert (await call(channel, "ModelService/Status"))[0] == "UNAUTHENTICATED"
    assert counted(server, "anonymous", "admitted") == 1


@pytest.mark.parametrize(
    ("quota", "method", "message", "allowed", "unit"),
    [
        ("requests_per_s = 0.001\nburst_s = 3000", "RankingService/Rank", None, 3, "requests"),
        ("rows_per_s = 0.01\nburst_s = 3000", "RankingService/Rank", None, 3, "rows"),
        ("actions_per_s = 0.001\nburst_s = 3000", "ActivityService/Record", "actions", 3, "actions"),
    ],
)
async def test_beyond_its_quota_a_caller_is_refused_and_told_when_to_come_back(
    behind, quota, method, message, allowed, unit
):
    one = activity_pb2.Action(
        user_id=1, pin_id=1, action="save", surface="home", time_ms=int(time.time() * 1e3), event_id=1
    )
    server, call = await behind(
        section("feed", FEED, ["rank", "record"], quota) + section("other", WRITER, ["rank", "record"]),
        record_actions=True,
    )
    sent = activity_pb2.RecordRequest(actions=[one]) if message else None
    for _ in range(allowed):
        assert (await call(method, sent, FEED))[0] == "OK"
    code, text, trailers = await call(method, sent, FEED)
    assert code == "RESOURCE_EXHAUSTED"
    assert f"caller 'feed' has used its quota of {quota.split()[2]} {unit} a second ({unit}_per_s)" in text
    assert trailers["grpc-retry-pushback-ms"] == "-1", "the quota comes back after the call's deadline"
    assert counted(server, "feed", f"over_quota_of_{unit}") == 1
    assert (await call(method, sent, WRITER))[0] == "OK", "another caller's quota is its own"


async def test_all_calls_without_an_identity_share_one_quota(behind):
    server, call = await behind('[anonymous]\nmay = ["rank"]\nrequests_per_s = 0.001\nburst_s = 2000\n' + NAMED)
    found = []
    for _ in range(4):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            made = channel.unary_unary("/pinrank.v1.RankingService/Rank")
            found.append((await made(MESSAGES["RankingService/Rank"].SerializeToString(), timeout=20).code()).name)
    assert found == ["OK", "OK", "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED"]
    assert (await call("RankingService/Rank", token=FEED))[0] == "OK"


async def test_a_changed_file_is_taken_over_and_a_broken_one_is_not(behind, tmp_path, caplog):
    server, call = await behind()
    (tmp_path / "callers.toml").write_text(section("feed", "another", ["rank"]))
    reloads = "pinrank_callers_reloads_total"
    await eventually(lambda: server.metrics.value(reloads, outcome="done") == 1)
    assert (await call("RankingService/Rank", token=FEED))[0] == "UNAUTHENTICATED"
    assert (await call("RankingService/Rank", token="another"))[0] == "OK"
    (tmp_path / "callers.toml").write_text("[callers.x]")
    await eventually(lambda: server.metrics.value(reloads, outcome="failed") == 1)
    assert (await call("RankingService/Rank", token="another"))[0] == "OK"
    (tmp_path / "callers.toml").write_text(NAMED)
    await eventually(lambda: server.metrics.value(reloads, outcome="done") == 2)
    assert (await call("RankingService/Rank", token=FEED))[0] == "OK"
    assert server.metrics.value(reloads, outcome="failed") == 1, "counted once, however often it was looked at"


async def described(channel, token=None):
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    made = stub.ServerReflectionInfo(metadata=metadata, timeout=20)
    await made.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    await made.done_writing()
    return [one.name async for answer in made for one in answer.list_services_response.service]


async def test_services_are_described_to_who_may_ask(behind):
    server, _ = await behind()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        assert "pinrank.v1.RankingService" in await described(channel, OPERATOR)
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        refused = stub.ServerReflectionInfo(metadata=(("authorization", f"Bearer {FEED}"),), timeout=20)
        assert (await refused.code(), "may not reflection" in await refused.details()) == (
            grpc.StatusCode.PERMISSION_DENIED, True,
        )  # fmt: skip


async def test_a_server_can_describe_nothing_to_anybody(serve):
    closed = await serve(reflection=False)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{closed.grpc_port}") as channel:
        unknown = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=20)
        assert await unknown.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_what_operators_do_is_logged_with_their_names_and_who_was_refused_too(behind, store, capsys):
    _, call = await behind()
    move = models_pb2.SetLabelRequest(label="canary", version=1, why="a\nb")
    assert (await call("ModelService/SetLabel", move, OPERATOR))[0] == "OK"
    assert (await call("ModelService/SetLabel", move, FEED))[0] == "PERMISSION_DENIED"
    assert (await call("ModelService/SetLabel", move, "wrong"))[0] == "UNAUTHENTICATED"
    out = capsys.readouterr()
    lines = [line for line in (out.out + out.err).splitlines() if "model_call" in line]
    assert len(lines) == 3, "one line each, whatever the request holds"
    done, denied, unknown = lines
    assert "operator" in done
    assert "SetLabel" in done
    assert "model_call_refused" in denied
    assert "PERMISSION_DENIED" in denied
    assert "UNAUTHENTICATED" in unknown
    assert "wrong" not in unknown


KEY = ec.generate_private_key(ec.SECP256R1())


def key_set(key, key_id="one"):
    return json.dumps({"keys": [json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key())) | {
        "kid": key_id, "alg": "ES256",
    }]})  # fmt: skip


def signed(key=KEY, key_id="one", **changes):
    claims = {"sub": "feed@prod", "iss": "https://issuer", "aud": "pinrank", "exp": time.time() + 600}
    given = {name: value for name, value in (claims | changes).items() if value is not None}
    return jwt.encode(given, key, "ES256", headers={"kid": key_id})


WITH_JWT = """
[jwt]
jwks = "jwks.json"
issuer = "https://issuer"
audience = "pinrank"
[callers.feed]
subjects = ["feed@prod"]
may = ["rank"]
"""


async def test_a_jwt_names_its_caller(behind, tmp_path):
    (tmp_path / "jwks.json").write_text(key_set(KEY))
    _, call = await behind(WITH_JWT)
    token = signed()
    for _ in range(2):  # the second time it is remembered
        assert (await call("RankingService/Rank", token=token))[0] == "OK"
    for wrong, problem in (
        (signed(exp=time.time() - 60), "expired"),
        (signed(aud="another"), "Audience"),
        (signed(iss="https://another"), "issuer"),
        (signed(exp=None), "exp"),
        (signed(sub="nobody"), "its subject is none of a caller's"),
        (signed(ec.generate_private_key(ec.SECP256R1())), "Signature"),
        (signed(key_id="two"), "its key is not in the key set"),
        (jwt.encode({"sub": "feed@prod"}, "x" * 32, "HS256", headers={"kid": "one"}), "alg value is not allowed"),
        (jwt.encode({"sub": "feed@prod"}, None, "none", headers={"kid": "one"}), "alg value is not allowed"),
        (token[:-8] + "AAAAAAAA", "Signature"),
    ):
        code, text, _ = await call("RankingService/Rank", token=wrong)
        assert (code, problem.lower() in text.lower()) == ("UNAUTHENTICATED", True), text


async def test_a_key_that_was_taken_out_of_the_set_opens_nothing_any_more(behind, tmp_path):
    (tmp_path / "jwks.json").write_text(key_set(KEY))
    server, call = await behind(WITH_JWT)
    token = signed()
    assert (await call("RankingService/Rank", token=token))[0] == "OK"
    (tmp_path / "jwks.json").write_text(key_set(ec.generate_private_key(ec.SECP256R1())))
    await eventually(lambda: server.metrics.value("pinrank_callers_reloads_total", outcome="done") == 1)
    assert (await call("RankingService/Rank", token=token))[0] == "UNAUTHENTICATED"


@pytest.mark.parametrize("tokens", [(FEED, ""), ("", FEED), ("wrong", FEED), (FEED, FEED)])
async def test_several_tokens_are_none(behind, tokens):
    server, _ = await behind('[anonymous]\nmay = ["rank"]\n' + NAMED)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        made = channel.unary_unary("/pinrank.v1.RankingService/Rank")(
            MESSAGES["RankingService/Rank"].SerializeToString(), timeout=20,
            metadata=tuple(("authorization", f"Bearer {token}") for token in tokens),
        )  # fmt: skip
        assert await made.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_stream_does_not_outlive_its_callers_permission(behind, tmp_path):
    server, _ = await behind(record_actions=True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        metadata = (("authorization", f"Bearer {WRITER}"),)
        stream = channel.stream_unary("/pinrank.v1.ActivityService/RecordStream")(metadata=metadata, timeout=60)
        one = activity_pb2.Action(
            user_id=1, pin_id=1, action="save", surface="home", time_ms=int(time.time() * 1e3), event_id=1
        )
        message = activity_pb2.RecordRequest(actions=[one]).SerializeToString()
        await stream.write(message)
        await eventually(lambda: server.metrics.value("pinrank_actions_total", outcome="added") == 1)
        (tmp_path / "callers.toml").write_text(section("feed", FEED, ["rank"]))
        await eventually(lambda: server.metrics.value("pinrank_callers_reloads_total", outcome="done") == 1)
        await stream.write(message)
        assert await stream.code() == grpc.StatusCode.UNAUTHENTICATED
    assert server.metrics.value("pinrank_actions_total", outcome="added") == 1


async def test_a_changed_file_refills_no_quota_that_it_leaves_as_it_was(behind, tmp_path):
    quota = "requests_per_s = 0.001\nburst_s = 2000"
    server, call = await behind(section("feed", FEED, ["rank"], quota))
    for _ in range(2):
        assert (await call("RankingService/Rank", token=FEED))[0] == "OK"
    (tmp_path / "callers.toml").write_text(section("feed", FEED, ["rank"], quota) + section("new", WRITER, ["rank"]))
    await eventually(lambda: server.metrics.value("pinrank_callers_reloads_total", outcome="done") == 1)
    assert (await call("RankingService/Rank", token=FEED))[0] == "RESOURCE_EXHAUSTED"
    (tmp_path / "callers.toml").write_text(section("feed", FEED, ["rank"], "requests_per_s = 0.001\nburst_s = 3000"))
    await eventually(lambda: server.metrics.value("pinrank_callers_reloads_total", outcome="done") == 2)
    assert (await call("RankingService/Rank", token=FEED))[0] == "OK", "a changed quota begins full"


async def test_a_message_of_too_many_actions_is_refused(behind):
    _, call = await behind(record_actions=True, record_actions_max=3)
    four = activity_pb2.RecordRequest(actions=[activity_pb2.Action()] * 4)
    code, text, _ = await call("ActivityService/Record", four, WRITER)
    assert (code, "actions: 4 actions; send at most 3 at a time" in text) == ("INVALID_ARGUMENT", True)
