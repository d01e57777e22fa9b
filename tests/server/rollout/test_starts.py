"""What a server begins with: what its label names, proven now, or else the newest of what it named that is good."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from model_store.bundle.files import BundleError
from model_store.registry.open_objects import open_objects
from model_store.registry.signing import Signer, SigningError
from server.proving.refusals import Refusals
from tests import tiny
from tests.conftest import eventually
from tests.model_store.registry.test_store import signing_key
from tests.processes import children
from tests.server.api.test_protocols import get
from tests.server.proving.test_prover import endless
from tests.server.swapping import held, own_golden, publish, sample


def labelled(store, tmp_path, version, **changes):
    """Publish a version and make it the stable one."""
    publish(store, tmp_path, version, **changes)
    store.set_label("tiny", "stable", version)


async def test_a_newest_version_that_is_broken_does_not_stop_a_start_and_is_told_of(serve, calls, store, tmp_path):
    labelled(store, tmp_path, 2)
    labelled(store, tmp_path, 3, **{"network.onnx": tiny.network(seed=99)})
    labelled(store, tmp_path, 4, **{"network.onnx": b"nothing"})
    server = await serve()
    call = calls(server)
    assert await call.version() == 2
    status = await call.status()
    assert [(label.version, label.wanted_version) for label in status.labels] == [(2, 4)]
    assert {one.version: one.phase for one in status.versions} == {2: "serving", 4: "failed"}
    assert "not an ONNX network" in await call.reason(4)
    assert "stable: 2 instead of 4" in [event.text for event in status.events]
    assert sample(server, "pinrank_label_behind", label="stable") == 1
    assert "stable: answers with version 2, the model store names 4" in (await get(server, "/healthz"))[1].splitlines()
    labelled(store, tmp_path, 5)
    await eventually(lambda: server.status.default.version == 5, 30)
    assert server.metrics.registry.get_sample_value("pinrank_label_behind", {"label": "stable"}) is None


async def test_a_bundle_that_crashes_whoever_runs_it_does_not_take_a_starting_server_along(
    serve, calls, store, tmp_path, prover
):
    labelled(store, tmp_path, 2, **{"network.onnx": endless()})
    starting = asyncio.create_task(serve(engine="numpy"))
    await eventually(lambda: bool(prover.helper_pid and children(prover.helper_pid)), 30)
    os.kill(children(prover.helper_pid)[0], signal.SIGSEGV)
    server = await starting
    assert await calls(server).version() == 1
    assert "the proving process was killed by SIGSEGV" in await calls(server).reason(2)


async def test_when_no_version_is_good_the_start_says_what_is_wrong_with_the_one_that_the_label_names(
    serve, store, tmp_path
):
    labelled(store, tmp_path, 2, **{"network.onnx": b"nothing"})
    objects = open_objects(store.where)
    objects.delete(f"tiny/blobs/{store.manifest('tiny', 1).files['network.onnx'].sha256}")
    with pytest.raises(BundleError, match="tiny@2: .*not an ONNX network"):
        await serve()
    (tmp_path / "models/tiny/log/000000000001.json").write_text("{")  # where the history cannot be read, too
    with pytest.raises(BundleError, match="tiny@2: .*not an ONNX network"):
        await serve(state_folder=tmp_path / "state")
    assert not (tmp_path / "state").exists()  # the next start sees for itself


async def test_an_unsigned_newest_version_does_not_stop_a_start_where_one_before_it_is_signed(
    serve, calls, store, tmp_path
):
    private, public = signing_key(tmp_path, "anna")
    with pytest.raises(SigningError, match="tiny@1 is not signed"):
        await serve(swap={"trusted_keys": (public,)})
    tiny.write_tiny_bundle(tmp_path / "signed", 2)
    store.publish(tmp_path / "signed", signer=Signer.read(private))
    store.set_label("tiny", "stable", 2)
    labelled(store, tmp_path, 3)
    server = await serve(swap={"trusted_keys": (public,)})
    assert await calls(server).version() == 2
    assert "tiny@3 is not signed" in await calls(server).reason(3)


async def test_what_recent_requests_ruled_out_is_not_begun_with_after_a_restart(
    serve, calls, store, tmp_path, monkeypatch
):
    monkeypatch.setattr("server.proving.recent_requests._EVERY_S", 0.0)  # keep every request
    settings = {"swap": {"rank_correlation_min": 0.95}, "state_folder": tmp_path / "state"}
    server = await serve(**settings)

    async def ask(server):
        for user in (1, 2, 3):
            await calls(server).rank(user=user, pins=range(1, 51))

    await ask(server)
    labelled(store, tmp_path, 2, **own_golden(tiny.network(seed=5)))
    await eventually(lambda: held(server, 2) == "failed", 30)
    await server.drain_and_close()
    again = await serve(**settings)
    assert await calls(again).version() == 1
    assert "ranks recent requests too differently from the answers" in await calls(again).reason(2)
    assert "(refused before a restart" in await calls(again).reason(2)
    assert sample(again, "pinrank_label_behind", label="stable") == 1
    await ask(again)
    await eventually(lambda: "before a restart" not in again.status.versions[2].reason, 30)
    await eventually(lambda: held(again, 2) == "failed", 30)
    assert "ranks recent requests too differently" in await calls(again).reason(2)
    await again.drain_and_close()
    # With another limit it may serve: it is tried once there are requests.
    third = await serve(state_folder=tmp_path / "state")
    assert await calls(third).version() == 1
    await ask(third)
    await eventually(lambda: third.status.default.version == 2, 30)
    assert list((tmp_path / "state/refused/tiny").iterdir()) == []


async def test_a_version_that_was_refused_serves_where_no_other_is_left(serve, calls, store, tmp_path):
    state = Refusals(tmp_path / "state", "tiny")
    state.note(store.release("tiny", 1).digest, "it was refused")
    server = await serve(state_folder=tmp_path / "state")
    assert await calls(server).version() == 1
    assert state.reason(store.release("tiny", 1).digest) is None


def test_refusals_outlive_a_process_are_bounded_and_a_folder_that_cannot_be_used_is_told_of(tmp_path, capfd):
    first, digests = Refusals(tmp_path, "tiny"), [f"{i:064x}" for i in range(120)]
    for digest in digests:
        first.note(digest, "x" * 10_000)
    second = Refusals(tmp_path, "tiny")
    assert second.reason(digests[-1]) == "x" * 2_000
    assert len(list((tmp_path / "refused/tiny").iterdir())) == 100
    assert Refusals(tmp_path, "other").reason(digests[-1]) is None
    assert second.reason("../../etc/passwd") is None
    second.forget(digests[-1])
    assert first.reason(digests[-1]) is None
    (tmp_path / "file").touch()
    for refusals in (Refusals(tmp_path / "file", "tiny"), Refusals(None, "tiny")):
        refusals.note(digests[0], "why")
        assert refusals.reason(digests[0]) is None
        refusals.forget(digests[0])
    assert "state_not_written" in capfd.readouterr().out
