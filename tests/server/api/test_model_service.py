"""What operators ask of a server about its models, and that nobody else can."""

from __future__ import annotations

import grpc
import pytest
from typer.testing import CliRunner

from server.cli.main import app
from tests.conftest import eventually
from tests.server.swapping import TOKEN, held, publish


async def test_versions_held_by_number_answer_by_number_until_they_are_let_go(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    publish(store, tmp_path, 2)
    with pytest.raises(grpc.aio.AioRpcError, match="version 2 is not served; this server serves 1"):
        await call.version(version=2)
    loaded = await call.do("Load", version=2)
    assert (loaded.phase, loaded.version) == ("serving", 2)
    assert await call.version(version=2) == 2
    assert await call.version() == 1
    await call.do("Unload", version=2)
    await eventually(lambda: held(server, 2) == "gone", 30)
    with pytest.raises(grpc.aio.AioRpcError, match="version 2 is not served"):
        await call.version(version=2)
    publish(store, tmp_path, 3, **{"network.onnx": b"nothing"})
    failed = await call.do("Load", version=3)
    assert (failed.phase, "not an ONNX network" in failed.reason) == ("failed", True)


async def test_labels_move_by_call_and_errors_have_their_statuses(serve, calls, store, tmp_path, caplog):
    server = await serve()
    call = calls(server)
    publish(store, tmp_path, 2)
    moved = await call.do("SetLabel", label="stable", version=2, by="anna", why="better", expected_version=1)
    entry = store.head("tiny")
    assert (moved.entry, entry.by, entry.why) == (entry.number, "anna", "better")
    await eventually(lambda: server.status.default.version == 2, 30)
    assert (await call.do("SetLabel", label="stable", version=2)).entry == 0
    for name, fields, code, text in (
        ("SetLabel", {"label": "stable", "version": 1, "expected_version": 1}, "ABORTED", "now names version 2, not 1"),
        ("SetLabel", {"label": "stable", "version": 9}, "NOT_FOUND", "has no version 9"),
        ("SetLabel", {"label": "NO", "version": 1}, "INVALID_ARGUMENT", "label 'NO'"),
        ("Load", {"version": 9}, "NOT_FOUND", "has no version 9"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.do(name, **fields)
        assert raised.value.code().name == code
        assert text in raised.value.details()


async def test_without_the_token_nothing_is_told_or_done(serve, calls, store):
    server = await serve()
    for token in ("", "wrong", TOKEN + "x"):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls(server, token).status()
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_without_a_token_file_the_service_takes_no_calls(serve, calls, store):
    closed = await serve(admin_token_file=None)
    for token in ("", TOKEN):
        with pytest.raises(grpc.aio.AioRpcError, match="set admin_token_file") as raised:
            await calls(closed, token).do("SetLabel", label="stable", version=1)
        assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_several_processes_take_labels_but_no_load_of_one(serve, calls):
    server = await serve(processes=2)
    with pytest.raises(grpc.aio.AioRpcError, match="2 processes share this port"):
        await calls(server).do("Load", version=1)


async def test_status_says_what_was_checked_and_done(serve, calls, store, tmp_path):
    server = await serve()
    call = calls(server)
    await call.rank(pins=range(1, 31))
    publish(store, tmp_path, 2)
    store.set_label("tiny", "stable", 2)
    await eventually(lambda: list(server.status.versions) == [2], 30)
    status = await call.status()
    (version,) = status.versions
    checks = "\n".join(version.checks)
    for expected in (
        "ABI: compatible with existing callers", "features: 0.0% of 30",
        "golden scores: correct (the network in another process)",
        "finite for all 30", "rank correlation", "memory: about",
    ):  # fmt: skip
        assert expected in checks
    assert version.memory_bytes > 0
    assert [event.text for event in status.events][-3:] == ["stable: 1 -> 2", "1 draining", "1 gone"]
    (label,) = [one for one in status.labels if one.label == "stable"]
    assert (label.version, label.wanted_version) == (2, 2)


@pytest.mark.parametrize("content", [b"", b"planted token", b"planted\xff", b"planted\nplanted"])
def test_the_command_refuses_a_token_that_no_call_can_bring_without_showing_it(content, tmp_path):
    path = tmp_path / "token"
    path.write_bytes(content)
    refused = CliRunner().invoke(app, ["model", "status", "--token-file", str(path), "--address", "127.0.0.1:1"])
    assert refused.exit_code == 1
    assert "does not hold a valid token" in refused.output
    assert "planted" not in refused.output
