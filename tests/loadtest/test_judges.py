"""Locust and MLPerf's loadgen as real processes against a real server."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.errors import LoadError
from loadtest.mlperf import parse_summary
from loadtest.shapes import users_at
from tests.conftest import free_port

BIN = Path(sys.executable).parent
LOADTEST = Path(__file__).parent.parent.parent / "loadtest"
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
    paths = ",".join(str(LOADTEST / file) for file in files.split(","))
    command = [str(BIN / "locust"), "-f", paths, "--headless", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def totals(folder: Path) -> dict[str, str]:
    with (folder / "run_stats.csv").open() as file:
        return next(row for row in csv.DictReader(file) if row["Name"] == "Rank")


def test_locust_calls_the_server_and_counts_its_answers(address: str, tmp_path: Path) -> None:
    done = locust(
        "--host", address, "-u", "5", "-r", "5", "-t", "3s", "--rate-per-user", "10", "--csv", str(tmp_path / "run"),
        *WORKLOAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = totals(tmp_path)
    assert int(found["Request Count"]) > 20
    assert int(found["Failure Count"]) == 0


def test_locust_reports_refusals_by_their_status(address: str, tmp_path: Path) -> None:
    done = locust(
        "--host", address, "-u", "1", "-t", "2s", "--csv", str(tmp_path / "run"), *WORKLOAD, "--surface", "nowhere"
    )
    assert done.returncode == 1  # Locust's own verdict on a run with failures
    assert int(totals(tmp_path)["Failure Count"]) > 0
    assert "INVALID_ARGUMENT" in (tmp_path / "run_failures.csv").read_text()


def test_locust_runs_distributed_with_a_shape(address: str, tmp_path: Path) -> None:
    port, files = str(free_port()), "locustfile.py,locust_shapes.py"
    shape = ["--load-shape", "steps", "--shape-users", "8", "--shape-s", "4"]
    paths = ",".join(str(LOADTEST / file) for file in files.split(","))
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
        sys.executable, "-m", "loadtest.mlperf", "--address", address, "--rate", "50", "--duration", "2",
        "--users", "1-4", "--pins", "1-50", "--candidates", "20", "--target-ms", "1000",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=LOADTEST.parent)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["statuses"] == {"OK": 100}
    assert 0 < verdict["p50_ms"] <= verdict["p99_ms"] <= verdict["max_ms"]


def test_loadgen_without_a_server_says_how_to_start_one() -> None:
    command = [sys.executable, "-m", "loadtest.mlperf", "--address", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, cwd=LOADTEST.parent)
    assert done.returncode == 1
    assert "pinrank serve" in done.stderr


def test_a_summary_of_another_form_is_refused_by_name() -> None:
    with pytest.raises(LoadError, match="scheduled_per_s"):
        parse_summary("Result is : VALID\n")
