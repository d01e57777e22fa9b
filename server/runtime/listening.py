"""Where a server listens: what the setting `host` may say, read once for the gRPC port and the HTTP port.

gRPC binds what it can of a name's addresses and keeps quiet about the rest, and the HTTP server takes only one; so a
name is resolved here, and both listen on every address that comes of it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc.aio

_UNIX = "unix:"
#: Both mean every address; one socket takes both families where the machine has IPv6.
_EVERYWHERE = ("::", "0.0.0.0")  # noqa: S104
#: Of an address that was resolved but this machine does not have: `localhost` is often both, also without IPv6.
_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class ListenError(Exception):
    """The server cannot listen there; the message says why."""


@dataclass(frozen=True, slots=True)
class Interface:
    """One address to listen on.

    Attributes:
        family: AF_INET or AF_INET6.
        host: the address in numbers, without brackets.
    """

    family: socket.AddressFamily
    host: str

    def at(self, port: int) -> str:
        """Return it as gRPC and URLs write it: `127.0.0.1:50051`, `[::1]:50051`."""
        return f"[{self.host}]:{port}" if self.family == socket.AF_INET6 else f"{self.host}:{port}"

    def bound(self, port: int, *options: int) -> socket.socket:
        """Return a socket that is bound there, as gRPC binds its own. Raises OSError.

        Args:
            port: 0 takes a free one.
            options: socket options to turn on before.
        """
        opened = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            for option in options:
                opened.setsockopt(socket.SOL_SOCKET, option, 1)
            if self.family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            opened.bind(socket.getaddrinfo(self.host, port, self.family, socket.SOCK_STREAM)[0][4])
        except OSError:
            opened.close()
            raise
        return opened


def interfaces(host: str) -> tuple[Interface, ...]:
    """Return the addresses that a host stands for, at least one, all of which this machine has.

    Args:
        host: an address (IPv6 with or without brackets), or a name.

    Raises:
        ListenError: it is no name that resolves, or no address of this machine.
    """
    bare = _bare(host)
    if bare in _EVERYWHERE:
        anywhere = Interface(socket.AF_INET6, "::"), Interface(socket.AF_INET, "0.0.0.0")  # noqa: S104
        return _held_here(host, anywhere)[:1]
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ListenError(f"host {host!r}: no address goes by that name ({error})") from error
    numbers = dict.fromkeys(Interface(family, _numeric(address)) for family, _, _, _, address in found)
    return _held_here(host, tuple(numbers))


def _numeric(address: tuple[Any, ...]) -> str:
    """Return a resolved address in numbers; with its interface, where it holds on one only (`fe80::1%2`)."""
    scope = address[3] if len(address) == 4 else 0
    return f"{address[0]}%{scope}" if scope else str(address[0])


def _held_here(host: str, candidates: tuple[Interface, ...]) -> tuple[Interface, ...]:
    held = []
    reason = ""
    for interface in candidates:
        try:
            interface.bound(0).close()
        except OSError as error:
            if error.errno not in _ABSENT:
                raise ListenError(f"host {host!r}: cannot listen on {interface.host} ({error.strerror})") from error
            reason = str(error.strerror)
        else:
            held.append(interface)
    if not held:
        raise ListenError(f"host {host!r}: this machine has no such address ({reason}); set host to one of its own")
    return tuple(held)


def open_grpc_port(server: grpc.aio.Server, host: str, port: int) -> int | str:
    """Let a gRPC server listen on every address of a host, on one port.

    Returns:
        The port, or the path of a Unix socket.

    Raises:
        ListenError: an address cannot be had, so that others could be answered by another server there.
    """
    path = socket_path(host)
    if path is not None:
        _free_socket_path(path)
        server.add_insecure_port(f"{_UNIX}{path}")
        return str(path)
    for interface in interfaces(host):
        try:
            port = server.add_insecure_port(interface.at(port))
        except RuntimeError as error:
            raise ListenError(
                f"cannot listen on {interface.at(port)}; is another server there? Set grpc_port to move"
            ) from error
    return port


def http_interfaces(host: str) -> tuple[Interface, ...]:
    """Return where the HTTP port is opened: with gRPC's, and on loopback where that is a Unix socket."""
    return interfaces("127.0.0.1" if socket_path(host) else host)


def shown(host: str, port: int | str) -> str:
    """Return a listening server's address as its log says it and a client takes it."""
    if isinstance(port, str):
        return f"{_UNIX}{port}"
    return f"[{_bare(host)}]:{port}" if ":" in host else f"{host}:{port}"


def http_shown(host: str, port: int) -> str:
    return shown("127.0.0.1" if socket_path(host) else host, port)


def http_url(host: str, port: int) -> str:
    """Return where this machine reaches the HTTP port."""
    return f"http://{http_shown('127.0.0.1' if _bare(host) in _EVERYWHERE else host, port)}"


def is_host(text: str) -> bool:
    """Tell whether a setting can be a host at all; a port in it, or a scheme, is a mistake to name early."""
    path = socket_path(text)
    if path is not None:
        return path.is_absolute()
    try:
        ipaddress.ip_address(_bare(text))
    except ValueError:
        return bool(text) and not set(text) & set(":/[]@ ")
    return True


def socket_path(host: str) -> Path | None:
    """Return the path of a host that is a Unix socket (`unix:/run/pinrank.sock`), None for any other."""
    return Path(host.removeprefix(_UNIX)) if host.startswith(_UNIX) else None


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _free_socket_path(path: Path) -> None:
    """Make sure that a Unix socket can be made at a path; gRPC itself would take the path from a running server."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ListenError(f"cannot listen on {path}: {path.parent} is no folder, or may not be written to")
    if not path.exists():
        return
    if not path.is_socket():
        raise ListenError(f"cannot listen on {path}: something is there that is no socket")
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:  # what a server that was killed left behind
            path.unlink()
        except OSError as error:
            raise ListenError(f"cannot listen on {path} ({error.strerror})") from error
        else:
            raise ListenError(f"cannot listen on {path}: another server is there; set host to move")
