"""`pinrank serve` with TLS as users run it: several processes on one port, and a certificate that is renewed."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pinrank.channels import open_channel
from pinrank.tls import ClientTls
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc
from tests.certificates import Authority, Mounted

PINRANK = Path(sys.executable).parent / "pinrank"
REQUEST = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")


@pytest.fixture
def command(model_store, feature_store_url):
    return [
        str(PINRANK), "serve", "--model-store", str(model_store), "--model", "tiny",
        "--feature-store", feature_store_url, "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip


def until(events, name, count):
    """Read log events until some of them have come; return them."""
    found = []
    while len(found) < count:
        event = json.loads(next(events))
        if event["event"] == name:
            found.append(event)
    return found


def shown_in_a_row(port, authority, wanted, within_s=30):
    """Connect until twenty connections in a row were shown a certificate; return how many were."""
    context = ssl.create_default_context(cafile=authority.file)
    context.set_alpn_protocols(["h2"])
    until_s, row = time.monotonic() + within_s, 0
    while row < 20 and time.monotonic() < until_s:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            row = row + 1 if secured.getpeercert()["serialNumber"] == wanted else 0
    return row


def test_all_processes_serve_a_renewed_certificate(command, tmp_path):
    authority = Authority(tmp_path / "authority")
    mounted = Mounted(tmp_path / "mounted", authority.server("first"), authority.file)
    environment = mounted.environment | {"PINRANK_TLS__RELOAD_S": "0.05"}
    with subprocess.Popen([*command, "--processes", "2"], stderr=subprocess.PIPE, text=True, env=environment) as served:
        try:
            addresses = {event["grpc"] for event in until(served.stderr, "serving", 2)}
            (address,) = addresses
            second = authority.server("second")
            mounted.show(second, authority.file)
            assert {event["serial"] for event in until(served.stderr, "tls_certificate_renewed", 2)} == {second.serial}
            # New connections go to either process.
            assert shown_in_a_row(int(address.rpartition(":")[2]), authority, second.serial) == 20
            with open_channel(address, tls=ClientTls(str(authority.file))) as channel:
                answer = ranking_pb2_grpc.RankingServiceStub(channel).Rank(REQUEST, timeout=20)
            assert sorted(answer.pin_ids) == [1, 2, 3]
            served.send_signal(signal.SIGTERM)
            assert served.wait(30) == 0
        finally:
            served.kill()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_server_that_would_listen_without_tls_does_not_start_and_names_both_ways(command, processes):
    refused = subprocess.run(
        [*command, "--host", "0.0.0.0", "--processes", processes],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"COLUMNS": "300"},
    )  # fmt: skip
    assert refused.returncode == 1
    said = " ".join(refused.stderr.split())
    assert "error: host 0.0.0.0: without TLS, everyone on the network path could read" in said
    assert "Set tls.certificate and tls.key; or, if the network is trusted" in said
    with subprocess.Popen(
        [*command, "--host", "0.0.0.0", "--processes", processes, "--insecure"], stderr=subprocess.PIPE, text=True
    ) as served:
        try:
            until(served.stderr, "serving", int(processes))
        finally:
            served.kill()
