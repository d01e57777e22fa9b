"""Locust and MLPerf's loadgen as real processes against a real server."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtest.errors import LoadError
from loadtest.judges.mlperf import parse_summary
from loadtest.shapes import users_at
from loadtest.workload import Workload
from tests.redis_servers import free_port

BIN = Path(sys.executable).parent
LOADTEST = Path(__file__).parents[2] / "loadtest"
WORKLOAD = ["--user-ids", "1-4", "--pin-ids", "1-50", "--candidates", "20"]


@pytest.fixture
def address(model_store: Path, feature_store_url: str) -> Iterator[str]:
    command = [
        str(BIN / "pinrank"), "serve", "--model-store", str(model_store), "--model", "tiny",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        yield next(event["grpc"] for event in map(json.loads, server.stderr) if event["event"] == "serving")
        server.kill()


def locust(*arguments: str, files: str = "locustfile.py") -> subprocess.CompletedProcess[str]:
    paths = ",".join(str(LOADTEST / "judges" / file) for file in files.split(","))
    command = [str(BIN / "locust"), "-f", paths, "--headless", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def totals(folder: Path, name: str = "Rank") -> dict[str, str]:
    with (folder / "run_stats.csv").open() as file:
        return next(row for row in csv.DictReader(file) if row["Name"] == name)


def eventually(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"


def test_locust_calls_the_server_and_counts_its_answers(address: str, tmp_path: Path) -> None:
    done = locust(
        "--host", address, "-u", "5", "-r", "5", "-t", "3s", "--rate-per-user", "10", "--csv", str(tmp_path / "run"),
        *WORKLOAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = totals(tmp_path)
    assert int(found["Request Count"]) > 20
    assert int(found["Failure Count"]) == 0


def test_locust_keeps_refusals_apart_from_answers_by_their_status(address: str, tmp_path: Path) -> None:
    done = locust(
        "--host",
        address,
        "-u",
        "1",
        "-t",
        "4s",
        "--rate-per-user",
        "20",
        "--csv",
        str(tmp_path / "run"),
        *WORKLOAD,
        "--surface",
        "nowhere",
    )
    assert done.returncode == 1  # Locust's own verdict on a run with failures
    refused = totals(tmp_path, "Rank INVALID_ARGUMENT")
    assert int(refused["Failure Count"]) == int(refused["Request Count"]) > 0
    assert totals(tmp_path, "Aggregated")["Request Count"] == refused["Request Count"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "127.0.0.1:1", "--pin-ids", "nowhere.npy"], "cannot read ids from nowhere.npy"),
        (["--host", "127.0.0.1:1", "--rate-per-user", "0"], "--rate-per-user 0"),
        (["--host", "127.0.0.1:1", "--pin-ids", "1-10"], "name more pins"),
        ([], "add --host"),
    ],
)
def test_locust_ends_a_test_that_it_cannot_send_and_says_why(arguments: list[str], says: str) -> None:
    done = locust("-u", "2", "-r", "2", "-t", "60s", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert "All users spawned" not in done.stderr


def test_locust_calls_the_host_that_its_page_names_for_each_test(address: str) -> None:
    page = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        str(BIN / "locust"), "-f", str(LOADTEST / "judges" / "locustfile.py"), "--web-host", "127.0.0.1",
        "--web-port", str(port), "--rate-per-user", "20", *WORKLOAD,
    ]  # fmt: skip

    def listens() -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    def names() -> set[str]:
        with urllib.request.urlopen(f"{page}/stats/requests") as answer:
            return {row["name"] for row in json.load(answer)["stats"]} - {"Aggregated"}

    def start(host: str) -> None:
        form = urllib.parse.urlencode({"user_count": 1, "spawn_rate": 1, "host": host}).encode()
        urllib.request.urlopen(f"{page}/swarm", form).close()

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            eventually(listens)
            start("127.0.0.1:1")
            eventually(lambda: names() == {"Rank UNAVAILABLE"})
            urllib.request.urlopen(f"{page}/stop", b"").close()
            start(address)
            eventually(lambda: names() == {"Rank"})
        finally:
            running.kill()


def test_locust_runs_distributed_with_a_shape(address: str, tmp_path: Path) -> None:
    port, files = str(free_port()), "locustfile.py,locust_shapes.py"
    shape = ["--load-shape", "steps", "--shape-users", "8", "--shape-s", "4"]
    paths = ",".join(str(LOADTEST / "judges" / file) for file in files.split(","))
    worker_command = [str(BIN / "locust"), "-f", paths, "--worker", "--master-port", port]
    with subprocess.Popen(worker_command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
        done = locust(
            "--host", address, "--master", "--expect-workers", "1", "--master-bind-port", port, "--csv",
            str(tmp_path / "run"), "--rate-per-user", "10", *shape, *WORKLOAD, files=files,
        )  # fmt: skip
        worker.kill()
    assert done.returncode == 0, done.stderr
    assert int(totals(tmp_path)["Request Count"]) > 20


@pytest.mark.parametrize(
    ("shape", "users"),
    [("steps", [25, 25, 50, 100, None]), ("ramp", [1, 20, 49, 90, None]), ("spike", [10, 10, 100, 10, None])],
)
def test_shapes_over_time(shape: str, users: list[int | None]) -> None:
    assert [users_at(shape, part, 100) for part in (0.0, 0.2, 0.49, 0.9, 1.0)] == users


def test_loadgen_judges_the_server(address: str) -> None:
    command = [
        sys.executable, "-m", "loadtest.judges.mlperf", "--address", address, "--rate", "50", "--duration", "2",
        "--users", "1-4", "--pins", "1-50", "--candidates", "20", "--target-ms", "1000",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=LOADTEST.parent)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["statuses"] == {"OK": 100}
    assert verdict["valid"] is False
    assert "Early stopping" in verdict["unmet"], "100 requests are too few for a P99"
    assert 0 < verdict["p50_ms"] <= verdict["p99_ms"] <= verdict["max_ms"]


def test_a_verdict_needs_answers_whatever_loadgen_says(address: str) -> None:
    """Every call ends at its deadline, far within the target."""
    request = Workload(np.arange(1, 5), np.arange(1, 51), ((20, 1.0),)).requests(1)
    script = (
        "import json, sys; from loadtest.judges.mlperf import judge\n"
        "print(json.dumps(judge(sys.argv[1], [bytes.fromhex(sys.argv[2])], 400, 2, 1000, 1e-6)))"
    )
    command = [sys.executable, "-c", script, address, next(request).hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=LOADTEST.parent)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["statuses"] == {"DEADLINE_EXCEEDED": 800}
    assert (verdict["loadgen_verdict"], verdict["valid"]) == ("VALID", False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--surface", "nowhere"], "the server refused the first request: INVALID_ARGUMENT"),
        (["--target-ms", "-1"], "--target-ms -1"),
        (["--address", "10.0.0.1:50051"], "--allow-remote"),
    ],
)
def test_loadgen_is_not_asked_about_what_cannot_be_judged(address: str, arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "loadtest.judges.mlperf", "--address", address, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=LOADTEST.parent)
    assert done.returncode == 1
    assert says in " ".join(done.stderr.split())


def test_without_loadgen_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlperf_loadgen.py").write_text("raise ModuleNotFoundError(name='mlperf_loadgen')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "loadtest.judges.mlperf"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=LOADTEST.parent,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 1
    assert "pip install 'pinrank[load]'" in done.stderr


def test_loadgen_without_a_server_says_how_to_start_one() -> None:
    command = [sys.executable, "-m", "loadtest.judges.mlperf", "--address", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=LOADTEST.parent)
    assert done.returncode == 1
    assert "pinrank serve" in done.stderr


def test_a_summary_of_another_form_is_refused_by_name() -> None:
    with pytest.raises(LoadError, match="scheduled_per_s"):
        parse_summary("Result is : VALID\n")
    with pytest.raises(LoadError, match="no verdict"):
        parse_summary("Scheduled samples per second : 46.28\n")
