"""`pinrank features`, as someone at a terminal uses it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
from typer.testing import CliRunner

from server.cli.main import app
from tests import tiny


def invoke(*arguments):
    return CliRunner().invoke(app, ["features", *map(str, arguments)])


def pins(path, count=100):
    ids = np.arange(1, count + 1, dtype=np.uint64)
    rows = tiny.pin_rows(ids)
    np.savez(path, id=ids, **{name: rows[name] for name in rows.dtype.names})
    return path


def test_a_group_is_loaded_and_shown_with_what_the_model_could_read(model_store, tmp_path):
    store = f"lmdb://{tmp_path / 'store'}"
    known = ("--feature-store", store, "--model-store", model_store, "--model", "tiny")
    loaded = invoke("load", pins(tmp_path / "pins.npz"), "--group", "pin_core", *known)
    assert loaded.exit_code == 0, loaded.output
    assert "loaded and verified pin_core@1: 100 rows" in loaded.output
    shown = invoke("stat", *known)
    assert shown.exit_code == 0, shown.output
    assert "100.0%" in shown.output
    assert "no values" in shown.output, "users were not loaded"
    told = json.loads(invoke("stat", "--feature-store", store, "--json").stdout.splitlines()[-1])
    assert told["pin_core@1"]["values"] == 100


def test_a_new_version_is_loaded_from_its_description(tmp_path):
    new = tiny.changed(tiny.PINS, version=2)
    (tmp_path / "pin_core-2.json").write_text(new.model_dump_json())
    loaded = invoke(
        "load", pins(tmp_path / "pins.npz"), "--group", tmp_path / "pin_core-2.json", "--feature-store",
        f"lmdb://{tmp_path / 'store'}",
    )  # fmt: skip
    assert "loaded and verified pin_core@2" in loaded.output


def test_what_cannot_be_done_is_one_line_with_the_fix(model_store, tmp_path):
    store = ("--feature-store", f"lmdb://{tmp_path / 'store'}")
    known = ("--model-store", model_store, "--model", "tiny")
    source = pins(tmp_path / "pins.npz")
    invoke("load", source, "--group", "pin_core", *store, *known)
    for arguments, says in (
        (("load", source, "--group", "pin_core", *store), "--model-store FOLDER --model NAME"),
        (("load", source, "--group", "nothing", *store, *known), "it reads pin_core, user_core"),
        (("load", tmp_path / "no.npz", "--group", "pin_core", *store, *known), "no.npz"),
        (("load", source, "--group", "user_core", *store, *known), "no column activity"),
        (("load", source, "--group", tmp_path / "absent.json", *store), "does not describe a feature group"),
        (("follow", *store, *known), "the stream must be in Redis"),
        (("follow", *store, *known, "--stream-url", "redis://127.0.0.1:port/0"), "the Redis URL cannot be used"),
        (("follow", *store, *known, "--stream-url", "redis+cluster://h:6379/7"), "the Redis URL cannot be used"),
        (("stat", "--feature-store", "ldap://x"), "unknown feature store"),
        (("load", source, "--group", "pin_core", "--feature-store", "memory://", *known), "use lmdb:///path, redis://"),
        (("stat", "--feature-store", "memory://"), "use lmdb:///path, redis://"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1, arguments
        assert says in result.output, result.output


def test_a_file_of_text_is_refused_in_one_line_with_its_column(model_store, tmp_path):
    ids = np.arange(1, 4, dtype=np.uint64)
    rows = tiny.pin_rows(ids)
    found = {name: rows[name] for name in rows.dtype.names} | {"topic": np.array(["DE", "FR", "IT"])}
    np.savez(tmp_path / "pins.npz", id=ids, note=ids, **found)
    result = invoke(
        "load", tmp_path / "pins.npz", "--group", "pin_core", "--feature-store", f"lmdb://{tmp_path / 'store'}",
        "--model-store", model_store, "--model", "tiny",
    )  # fmt: skip
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "ignored because pin_core@1 has no such field: column note" in result.output
    assert "column topic holds <U2; the field needs numbers" in result.output


def test_a_follower_folds_until_it_is_told_to_stop_and_says_what_it_did(model_store, redis_server):
    client = redis_server.client()
    client.flushall()
    for number in range(1, 6):
        client.xadd(
            "pinrank:actions",
            {
                "event_id": number, "user_id": 1, "pin_id": 3, "action": "save", "surface": "home",
                "time_ms": int(time.time() * 1e3) + number,
            },
        )  # fmt: skip
    command = [
        sys.executable, "-c", "from server.cli.main import app; app()", "features", "follow", "--feature-store",
        redis_server.url, "--model-store", str(model_store), "--model", "tiny",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        ends_s = time.monotonic() + 30
        while client.xlen("pinrank:actions") and time.monotonic() < ends_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert process.stdout.read().strip() == "5 added, 0 repeated, 0 too old, 0 refused"
    assert 89 * 86_400 < client.ttl(tiny.ACTIONS.key(1)) <= 90 * 86_400


def test_a_mistyped_path_makes_no_store(model_store, tmp_path):
    known = ("--model-store", model_store, "--model", "tiny")
    absent = f"lmdb://{tmp_path / 'absent'}"
    followed = invoke("follow", "--feature-store", absent, "--stream-url", "redis://127.0.0.1:1/0", *known)
    assert followed.exit_code == 1
    assert f"no feature store at {tmp_path / 'absent'}; fill one first, or correct the URL" in followed.output
    deep = f"{absent}/features"
    loaded = invoke("load", pins(tmp_path / "pins.npz"), "--group", "pin_core", "--feature-store", deep, *known)
    assert loaded.exit_code == 1
    assert f"the folder {tmp_path / 'absent'} does not exist; create it first" in loaded.output
    assert not (tmp_path / "absent").exists()


def test_commands_that_read_make_no_store_and_need_no_writable_volume(model_store, tmp_path):
    absent = tmp_path / "absent"
    refused = invoke("stat", "--feature-store", f"lmdb://{absent}")
    assert refused.exit_code == 1
    assert f"no feature store at {absent}" in refused.output
    assert not absent.exists()
    known = ("--model-store", model_store, "--model", "tiny")
    compared = CliRunner().invoke(
        app,
        ["model", "diff", "tiny", "1", "2", "--store", str(model_store), "--feature-store", f"lmdb://{absent}"],
    )
    assert f"no feature store at {absent}" in compared.output
    assert not absent.exists()

    store = f"lmdb://{tmp_path / 'store'}"
    invoke("load", pins(tmp_path / "pins.npz"), "--group", "pin_core", "--feature-store", store, *known)
    (tmp_path / "store/lock.mdb").unlink()
    (tmp_path / "store/lock.mdb").mkdir()  # as on a volume that is mounted read-only, the lock cannot be written
    command = [sys.executable, "-c", "from server.cli.main import app; app()", "features", "stat", "--json"]
    shown = subprocess.run([*command, "--feature-store", store], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(shown.stdout)["pin_core@1"]["values"] == 100
    assert "feature_store_without_lock" in shown.stderr
