"""Ports that something else has, had, or is about to have."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import grpc
import pytest

from server.app import StartError
from server.processes import reserved_port
from server.runtime.listening import ListenError, interfaces, open_grpc_port


@pytest.fixture
def left_port():
    """A port whose server is gone, and the connections that it ended are not quite (TIME_WAIT)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0] as accepted:
            accepted.close()
            assert client.recv(1) == b""
    with socket.socket() as plain, pytest.raises(OSError, match="Address already in use"):
        plain.bind(("127.0.0.1", port))
    return port


def shared(host, port):
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    assert open_grpc_port(server, host, port) == port
    return server


async def test_several_processes_take_the_port_that_one_has_just_left(config, left_port):
    with reserved_port(config.model_copy(update={"grpc_port": left_port})) as port:
        assert port == left_port
        servers = [shared(config.host, port) for _ in range(2)]
    for server in servers:
        await server.stop(None)


async def test_a_held_port_is_for_processes_of_one_parent_only(config):
    with reserved_port(config) as port:
        taken = config.model_copy(update={"grpc_port": port})
        # Before ours listen, and when they do.
        with pytest.raises(StartError, match="is another server using it"), reserved_port(taken):
            pass
        server = shared(config.host, port)
        with pytest.raises(StartError, match="is another server using it"), reserved_port(taken):
            pass
        with pytest.raises(ListenError, match="is another server using it"):
            open_grpc_port(grpc.aio.server(options=[("grpc.so_reuseport", 0)]), config.host, port)
        await server.stop(None)


async def test_a_name_of_two_addresses_is_refused_when_one_of_them_is_taken(monkeypatch):
    """gRPC would take the other one, and keep quiet."""
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "127.0.0.2")]
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **o: here if host == "two" else real(host, *rest, **o)
    )
    assert [interface.at(1) for interface in interfaces("two")] == ["127.0.0.1:1", "127.0.0.2:1"]
    with socket.create_server(("127.0.0.2", 0)) as taken:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        with pytest.raises(ListenError, match=r"cannot listen on 127.0.0.2:\d+; is another server using it"):
            open_grpc_port(server, "two", taken.getsockname()[1])


def test_addresses_of_a_name_that_the_machine_lacks_are_left_out(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("192.0.2.1", "127.0.0.1")]
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **o: found if host == "two" else real(host, *rest, **o)
    )
    assert [interface.at(1) for interface in interfaces("two")] == ["127.0.0.1:1"]


def link_local():
    """An address of this machine that holds on one interface only, and that interface's name."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return None
    found = [(line.split()[0], line.split()[-1]) for line in lines if line.startswith("fe80")]
    return (ipaddress.IPv6Address(int(found[0][0], 16)), found[0][1]) if found else None


@pytest.mark.skipif(link_local() is None, reason="this machine has no link-local address")
async def test_a_link_local_address_is_listened_on_with_its_interface():
    address, name = link_local()
    [interface] = interfaces(f"{address}%{name}")
    with interface.bound(0) as bound:
        assert bound.getsockname()[3] == socket.if_nametoindex(name)
    server = grpc.aio.server()
    assert open_grpc_port(server, f"{address}%{name}", 0) > 0
    await server.stop(None)
