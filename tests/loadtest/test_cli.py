from __future__ import annotations

import asyncio
import json

import pytest
import typer
from typer.testing import CliRunner, Result

from loadtest.cli import register
from loadtest.errors import LoadError
from loadtest.settings import check_address, check_bounds
from tests.redis_servers import free_port


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


@pytest.mark.parametrize("address", ["127.0.0.1:50051", "localhost:1", "[::1]:50051", "127.9.9.9:1"])
def test_this_machine_needs_no_permission(address):
    check_address(address, allow_remote=False)


@pytest.mark.parametrize("address", ["10.0.0.1:50051", "ranking.example:50051", "[fd00::1]:50051"])
def test_another_machine_needs_permission(address):
    with pytest.raises(LoadError, match="--allow-remote"):
        check_address(address, allow_remote=False)
    check_address(address, allow_remote=True)


@pytest.mark.parametrize("address", ["127.0.0.1", ":50051", "localhost:", "localhost:grpc"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(LoadError, match="host:port"):
        check_address(address, allow_remote=True)


def test_bounds_hold_and_name_the_setting():
    good = {"rate": 100.0, "duration_s": 10.0, "warmup_s": 2.0, "callers": 0, "deadline_ms": 25.0}
    check_bounds(**good)
    check_bounds(**good | {"rate": 40_000.0, "duration_s": 3_600.0, "callers": 8})
    for change, says in (
        ({"rate": 0.0}, "--rate"),
        ({"rate": 1e6}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"rate": 1_000.0, "duration_s": 1_000.0}, "1,000,000"),
        ({"duration_s": 0.0}, "--duration"),
        ({"duration_s": 1e6}, "--duration"),
        ({"warmup_s": -1.0}, "--warmup-s"),
        ({"callers": 5_000}, "--closed-loop"),
        ({"deadline_ms": 0.0}, "--deadline-ms"),
        ({"deadline_ms": float("nan")}, "--deadline-ms must be above 0 and at most 60,000 milliseconds, but is nan"),
    ):
        with pytest.raises(LoadError, match=says):
            check_bounds(**good | change)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--address", "10.0.0.1:50051"], "--allow-remote"),
        (["--rate", "1e9"], "--rate"),
        (["--pins", "1-10", "--candidates", "128"], "add pins"),
        (["--users", "nowhere.npy"], "cannot read ids"),
        (["--json", "no/such/folder/summary.json"], "there is no folder"),
        (["--deadline-ms", "nan"], "--deadline-ms must be above 0 and at most 60,000 milliseconds, but is nan"),
        (["--target-ms", "nan"], "--target-ms must be above 0 and at most 60,000 milliseconds, but is nan"),
        (["--speed", "nan"], "--speed must be a finite number above 0, but is nan"),
        (["--popularity", "nan"], "the popularity must be a finite number of at least 0, but is nan"),
        (["--seed", "-1"], "the seed must be at least 0, but is -1"),
        (["--steps", "50,-1"], "--rate must be above 0 and at most 50,000 requests per second, but is -1"),
        (["--steps", "50", "--search"], "--steps and --search cannot be used together; choose one"),
    ],
)
def test_what_cannot_be_offered_is_refused_before_any_load(arguments, says):
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert says in result.output


def test_a_missing_server_is_said_so(monkeypatch):
    monkeypatch.setattr("loadtest.cli.CONNECT_S", 0.05)
    result = invoke("--address", f"127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert "no server answers at" in result.output


async def test_a_run_reports_and_writes_json(server, tmp_path):
    path = tmp_path / "summary.json"
    arguments = [
        "--address", f"127.0.0.1:{server.grpc_port}", "--rate", "200", "--duration", "0.3", "--warmup-s", "0.1",
        "--candidates", "4:1,16:1", "--users", "1-4", "--pins", "1-50", "--deadline-ms", "10000",
        "--target-ms", "10000", "--json", str(path),
    ]  # fmt: skip
    result = await asyncio.to_thread(invoke, *arguments)
    assert result.exit_code == 0, result.output
    assert "goodput" in result.output
    written = json.loads(path.read_text())
    assert set(written["summary"]["statuses"]) == {"OK"}
    assert written["summary"]["degraded"] == 0
    assert written["settings"]["rate_per_s"] == 200


async def test_closed_loop_reports_its_throughput(server):
    arguments = [
        "--address", f"127.0.0.1:{server.grpc_port}", "--closed-loop", "2", "--duration", "0.2", "--warmup-s", "0",
        "--candidates", "16", "--users", "1-4", "--pins", "1-50", "--deadline-ms", "10000",
    ]  # fmt: skip
    result = await asyncio.to_thread(invoke, *arguments)
    assert result.exit_code == 0, result.output
    assert "answered OK" in result.output


async def test_a_workload_that_the_server_refuses_stops_before_the_clock_starts(server):
    arguments = ["--address", f"127.0.0.1:{server.grpc_port}", "--surface", "nowhere"]
    result = await asyncio.to_thread(invoke, *arguments)
    assert result.exit_code == 1
    assert "INVALID_ARGUMENT" in result.output
    assert "unknown surface" in result.output


def test_what_to_install_is_said_with_its_brackets(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused = invoke("--report", str(tmp_path / "load.html"))
    assert refused.exit_code == 1
    assert "error: --report needs matplotlib, which is not installed: pip install 'pinrank[load]'" in refused.output
