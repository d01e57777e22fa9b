"""The commands that call a server, with a caller's token."""

from __future__ import annotations

import pytest

from tests.server.access.test_gate import FEED, section
from tests.server.cli.test_tls_clients import RANK, invoke

LOAD = ["load", "--rate", "5", "--duration", "1", "--warmup-s", "0", "--candidates", "5", "--pins", "1-30"]


@pytest.mark.parametrize("command", [RANK, [*LOAD, "--deadline-ms", "20000"]], ids=["rank", "load"])
async def test_a_command_sends_the_token_of_a_file(start_server, tmp_path, command):
    (tmp_path / "callers.toml").write_text(section("feed", FEED, ["rank"]))
    (tmp_path / "token").write_text(f"{FEED}\n")
    (tmp_path / "wrong").write_text("wrong")
    (tmp_path / "two").write_text("two words")
    server = await start_server(callers_file=tmp_path / "callers.toml")
    address = ["--address", f"127.0.0.1:{server.grpc_port}"]
    done = await invoke(*command, *address, "--token-file", str(tmp_path / "token"))
    assert done.exit_code == 0, done.output
    done = await invoke(*command, *address, env={"PINRANK_TOKEN_FILE": str(tmp_path / "token")})
    assert done.exit_code == 0, done.output
    for name, problem in (
        ("wrong", "UNAUTHENTICATED: the token is not that of a caller"),
        ("two", "does not hold a valid token: a token is one line"),
        ("none", "No such file"),
    ):
        failed = await invoke(*command, *address, "--token-file", str(tmp_path / name))
        assert failed.exit_code == 1
        assert problem in failed.output
        assert "two words" not in failed.output
    failed = await invoke(*command, *address)
    assert "UNAUTHENTICATED: this server answers only callers that it knows" in failed.output
