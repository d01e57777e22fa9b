"""The commands that call a server, with TLS; and what they say when one side speaks it and the other does not."""

from __future__ import annotations

import asyncio
import datetime as dt

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from tests.certificates import Authority
from tests.server.edges import EDGES
from tests.server.swapping import TOKEN

RANK = ["rank", "--user", "1", "--pins", "1,2,3", "--deadline-ms", "20000"]


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture(params=EDGES)
async def server(start_server, authority, tmp_path, request):
    """A server that wants certificates of its clients."""
    pair = authority.server()
    (tmp_path / "token").write_text(TOKEN)
    files = {"certificate": pair.certificate, "key": pair.key, "client_ca": authority.file}
    return await start_server(tls=files, grpc_edge=request.param.kind, admin_token_file=tmp_path / "token")


async def invoke(*arguments, env=None):
    return await asyncio.to_thread(CliRunner().invoke, app, arguments, env={"COLUMNS": "300"} | (env or {}))


def options(authority, pair):
    return ["--tls-ca", str(authority.file), "--tls-cert", str(pair.certificate), "--tls-key", str(pair.key)]


async def test_a_command_calls_a_server_with_its_options_or_variables(server, authority, tmp_path):
    pair, address = authority.client(), ["--address", f"127.0.0.1:{server.grpc_port}"]
    done = await invoke(*RANK, *address, *options(authority, pair))
    assert done.exit_code == 0, done.output
    env = {"PINRANK_TLS_CA": authority.file, "PINRANK_TLS_CERT": pair.certificate, "PINRANK_TLS_KEY": pair.key}
    env = {name: str(value) for name, value in env.items()} | {"PINRANK_TLS_NAME": "ranker.example"}
    done = await invoke(*RANK, *address, env=env)
    assert done.exit_code == 0, done.output
    done = await invoke("model", "status", "--token-file", str(tmp_path / "token"), *address, env=env)
    assert done.exit_code == 0, done.output


async def test_a_command_without_tls_says_that_the_server_speaks_it(server, tmp_path):
    address = ["--address", f"127.0.0.1:{server.grpc_port}"]
    for command in (RANK, ["model", "status", "--token-file", str(tmp_path / "token")]):
        failed = await invoke(*command, *address)
        assert failed.exit_code == 1
        assert "speaks TLS: set --tls-ca to its authority (PINRANK_TLS_CA)" in failed.output


@pytest.mark.parametrize("kind", EDGES)
@pytest.mark.parametrize("form", ["127.0.0.1", "unix"])
async def test_a_command_with_tls_says_that_the_server_speaks_none(start_server, authority, tmp_path, form, kind):
    host = f"unix:{tmp_path}/socket" if form == "unix" else form
    plain = await start_server(host=host, grpc_edge=kind.kind)
    address = host if form == "unix" else f"{form}:{plain.grpc_port}"
    failed = await invoke(*RANK, "--address", address, "--tls-ca", str(authority.file))
    assert failed.exit_code == 1
    assert f"the server at {address} speaks no TLS: unset --tls-ca" in failed.output


async def test_a_command_says_why_one_side_does_not_trust_the_other(server, authority, tmp_path):
    address = ["--address", f"127.0.0.1:{server.grpc_port}"]
    foreign, pair = Authority(tmp_path / "foreign", "foreign"), authority.client()
    expired = authority.client("expired", valid=-dt.timedelta(days=1))
    for given, message in (
        (["--tls-ca", str(foreign.file)], "is not trusted ("),
        ([*options(authority, pair), "--tls-name", "else.example"], "is not trusted (Hostname mismatch"),
        (["--tls-ca", str(authority.file)], "it may want a client certificate: set --tls-cert and --tls-key"),
        (options(authority, expired), "it may want another client certificate"),
    ):
        failed = await invoke(*RANK, *address, *given)
        assert failed.exit_code == 1
        assert message in failed.output


async def test_a_server_that_is_not_there_is_no_matter_of_tls(authority):
    for given in ([], ["--tls-ca", str(authority.file)]):
        failed = await invoke(*RANK, "--address", "127.0.0.1:1", *given)
        assert "no server answers at 127.0.0.1:1" in failed.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tls-name", "a"], "--tls-name needs --tls-ca"),
        (["--tls-ca", "system", "--tls-key", "a"], "--tls-cert and --tls-key go together"),
        (["--tls-ca", "nowhere.pem"], "cannot use nowhere.pem"),
    ],
)
async def test_options_that_cannot_be_used_are_named(given, message):
    failed = await invoke(*RANK, *given)
    assert failed.exit_code == 2
    assert message in failed.output
