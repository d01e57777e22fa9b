"""The load generators against a server that wants certificates of its clients."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest

from tests.certificates import Authority
from tests.loadtest.test_cli import invoke
from tests.loadtest.test_judges import BIN, JUDGES, LOADTEST, WORKLOAD


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
async def address(start_server, authority):
    pair = authority.server()
    files = {"certificate": pair.certificate, "key": pair.key, "client_ca": authority.file}
    server = await start_server(tls=files)
    return f"127.0.0.1:{server.grpc_port}"


def variables(authority):
    pair = authority.client()
    found = {"PINRANK_TLS_CA": authority.file, "PINRANK_TLS_CERT": pair.certificate, "PINRANK_TLS_KEY": pair.key}
    return {name: str(path) for name, path in found.items()}


def run(command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=90, check=False, cwd=LOADTEST.parent,
        env=os.environ | environment,
    )  # fmt: skip


async def test_load_is_offered_over_tls(address, authority):
    pair = authority.client()
    arguments = [
        "--address", address, "--rate", "100", "--duration", "0.3", "--warmup-s", "0", "--candidates", "16",
        "--users", "1-4", "--pins", "1-50", "--deadline-ms", "10000", "--target-ms", "10000",
    ]  # fmt: skip
    options = ["--tls-ca", authority.file, "--tls-cert", pair.certificate, "--tls-key", pair.key]
    done = await asyncio.to_thread(invoke, *arguments, *map(str, options))
    assert done.exit_code == 0, done.output
    assert "goodput" in done.output
    failed = await asyncio.to_thread(invoke, *arguments)
    assert failed.exit_code == 1
    assert "speaks TLS: set --tls-ca to its authority" in failed.output


async def test_loadgen_judges_a_server_over_tls(address, authority):
    command = [
        sys.executable, "-m", "loadtest.judges.mlperf", "--address", address, "--rate", "50", "--duration", "1",
        "--users", "1-4", "--pins", "1-50", "--candidates", "20", "--target-ms", "1000", "--deadline-ms", "10000",
    ]  # fmt: skip
    done = await asyncio.to_thread(run, command, **variables(authority))
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["statuses"]) == {"OK"}


async def test_locust_calls_a_server_over_tls(address, authority):
    command = [
        str(BIN / "locust"), "-f", str(JUDGES / "locustfile.py"), "--headless", "--host", address, "-u", "3", "-r", "3",
        "-t", "3s", "--rate-per-user", "10", "--json", *WORKLOAD,
    ]  # fmt: skip
    found = variables(authority)
    options = [f"--grpc-tls-{name.removeprefix('PINRANK_TLS_').lower()}={path}" for name, path in found.items()]
    for extra, environment in ((options, {}), ([], found)):
        done = await asyncio.to_thread(run, [*command, *extra], **environment)
        assert done.returncode == 0, done.stderr
        (total,) = json.loads(done.stdout)
        assert total["name"] == "Rank"
        assert total["num_requests"] > 5
        assert total["num_failures"] == 0
    done = await asyncio.to_thread(run, [*command, "--grpc-tls-key", "a"])
    assert "--tls-key needs --tls-ca" in done.stderr
