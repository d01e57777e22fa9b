"""Resolves the setting `host` to the addresses that the gRPC port and the HTTP port listen on.

gRPC binds those of a name's addresses that it can and silently ignores the rest, and the HTTP server binds only one. So
we resolve a name here, and both ports listen on every address that it resolves to.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc
    import grpc.aio

_UNIX = "unix:"
#: Both mean all addresses; with IPv6, one socket accepts both families.
_EVERYWHERE = ("::", "0.0.0.0")  # noqa: S104
#: Errors for an address that this machine does not have: `localhost` often resolves to ::1 even without IPv6.
_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


#: Connections that wait to be accepted; the system lowers it to its own maximum.
BACKLOG = 4096
#: Descriptors of listeners: about this one, or the last that the process may have; and how many may follow.
_DESCRIPTOR, _DESCRIPTORS_ABOVE = 16_384, 64


class ListenError(Exception):
    """The server cannot listen on an address; the message says why."""


@dataclass(frozen=True, slots=True)
class Interface:
    """One address to listen on.

    Attributes:
        family: AF_INET or AF_INET6.
        host: the numeric address, without brackets.
    """

    family: socket.AddressFamily
    host: str

    def at(self, port: int) -> str:
        """Return the address and a port as gRPC and URLs write them: `127.0.0.1:50051`, `[::1]:50051`."""
        return f"[{self.host}]:{port}" if self.family == socket.AF_INET6 else f"{self.host}:{port}"

    def bound(self, port: int, *options: int) -> socket.socket:
        """Return a socket that is bound to the address the way gRPC binds its own. Raises OSError.

        Args:
            port: port to bind; 0 takes a free one.
            options: socket options to turn on before binding.
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
    """Return those addresses of a host that this machine has, at least one.

    Args:
        host: an address (IPv6 with or without brackets), or a host name.

    Raises:
        ListenError: the name does not resolve, or this machine has none of its addresses.
    """
    bare = _bare(host)
    if bare in _EVERYWHERE:
        anywhere = Interface(socket.AF_INET6, "::"), Interface(socket.AF_INET, "0.0.0.0")  # noqa: S104
        return _held_here(host, anywhere)[:1]
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ListenError(
            f"host {host!r}: the name does not resolve ({error}); set host to an address of this machine"
        ) from error
    numbers = dict.fromkeys(Interface(family, _numeric(address)) for family, _, _, _, address in found)
    return _held_here(host, tuple(numbers))


def _numeric(address: tuple[Any, ...]) -> str:
    """Return a resolved address in numeric form; a link-local one includes its interface (`fe80::1%2`)."""
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


def open_grpc_port(
    server: grpc.aio.Server, host: str, port: int, credentials: Callable[[], grpc.ServerCredentials] | None = None
) -> int | str:
    """Make a gRPC server listen on one port of every address of a host.

    Args:
        server: the server.
        host: the setting `host`.
        port: the port; 0 takes a free one.
        credentials: makes TLS credentials, for each address its own; without it, the server speaks plain text.

    Returns:
        The port, or the path of a Unix socket.

    Raises:
        ListenError: an address cannot be bound; another server may be listening there.
    """
    path = socket_path(host)
    if path is not None:
        _free_socket_path(path)
        _add_port(server, f"{_UNIX}{path}", credentials)
        return str(path)
    for interface in interfaces(host):
        try:
            port = _add_port(server, interface.at(port), credentials)
        except RuntimeError as error:
            raise _is_taken(interface.at(port)) from error
    return port


def _add_port(server: grpc.aio.Server, at: str, credentials: Callable[[], grpc.ServerCredentials] | None) -> int:
    return server.add_insecure_port(at) if credentials is None else server.add_secure_port(at, credentials())


def grpc_sockets(host: str, port: int, *, shared_port: bool) -> list[socket.socket]:
    """Return sockets that are bound to one port of every address of a host, or to its Unix socket.

    Args:
        host: the setting `host`.
        port: the port; 0 takes a free one.
        shared_port: whether other processes of this server listen on the same port.

    Raises:
        ListenError: an address cannot be bound; another server may be listening there.
    """
    path = socket_path(host)
    if path is not None:
        _free_socket_path(path)
        opened = socket.socket(socket.AF_UNIX)
        opened.bind(str(path))
        return [_closed_first(opened)]
    options = (socket.SO_REUSEADDR, socket.SO_REUSEPORT) if shared_port else (socket.SO_REUSEADDR,)
    bound: list[socket.socket] = []
    for interface in interfaces(host):
        try:
            bound.append(interface.bound(port, *options))
            bound[-1].listen(BACKLOG)
        except OSError as error:
            for one in bound:
                one.close()
            raise _is_taken(interface.at(port)) from error
        port = bound[0].getsockname()[1]
    return [_closed_first(one) for one in bound]


def _closed_first(opened: socket.socket) -> socket.socket:
    """Return a listener under a high descriptor, so that it is closed before its connections if the process is killed.

    Linux closes the descriptors of a killed process in descending order. Clients whose connections end connect again at
    once: under a low descriptor, a third of them reached the listener of the dying process, which then reset them.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = (min(soft, _DESCRIPTOR) if soft != resource.RLIM_INFINITY else _DESCRIPTOR) - _DESCRIPTORS_ABOVE
    try:
        high = socket.socket(fileno=fcntl.fcntl(opened.fileno(), fcntl.F_DUPFD_CLOEXEC, max(0, least)))
    finally:
        opened.close()
    return high


def _is_taken(address: str) -> ListenError:
    return ListenError(f"cannot listen on {address}; is another server using it? Set grpc_port to another port")


def http_sockets(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on the HTTP port of gRPC's addresses, or of loopback if gRPC has a Unix socket.

    Args:
        host: the setting `host`.
        port: the port; 0 takes a free one, the same on every address.

    Raises:
        ListenError: an address cannot be bound; another server may be listening there.
    """
    opened: list[socket.socket] = []
    for interface in interfaces("127.0.0.1" if socket_path(host) else host):
        try:
            opened.append(interface.bound(port, socket.SO_REUSEADDR))
            opened[-1].listen(BACKLOG)
        except OSError as error:
            for one in opened:
                one.close()
            raise ListenError(
                f"cannot listen on {interface.at(port)} ({error.strerror}); set http_port to another port"
            ) from error
        port = opened[0].getsockname()[1]
    return opened


def shown(host: str, port: int | str) -> str:
    """Return a server's gRPC address in the form that logs show and clients accept."""
    if isinstance(port, str):
        return f"{_UNIX}{port}"
    return f"[{_bare(host)}]:{port}" if ":" in host else f"{host}:{port}"


def http_shown(host: str, port: int) -> str:
    return shown("127.0.0.1" if socket_path(host) else host, port)


def http_url(host: str, port: int, scheme: str = "http") -> str:
    """Return the URL under which this machine reaches the HTTP port."""
    return f"{scheme}://{http_shown('127.0.0.1' if _bare(host) in _EVERYWHERE else host, port)}"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to a host. Raises ListenError as `interfaces` does."""
    if socket_path(host) is not None:
        return True
    return all(ipaddress.ip_address(one.host.partition("%")[0]).is_loopback for one in interfaces(host))


def is_host(text: str) -> bool:
    """Return whether a text can be a host; a text with a port or a scheme cannot, so that the mistake shows early."""
    path = socket_path(text)
    if path is not None:
        return path.is_absolute()
    try:
        ipaddress.ip_address(_bare(text))
    except ValueError:
        return bool(text) and not set(text) & set(":/[]@ ")
    return True


def socket_path(host: str) -> Path | None:
    """Return the path if a host is a Unix socket (`unix:/run/pinrank.sock`), or else None."""
    return Path(host.removeprefix(_UNIX)) if host.startswith(_UNIX) else None


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _free_socket_path(path: Path) -> None:
    """Make a path free for a Unix socket; gRPC itself would take over the path of a running server."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ListenError(f"cannot listen on {path}: {path.parent} is not a folder, or the server may not write to it")
    if not path.exists():
        return
    if not path.is_socket():
        raise ListenError(
            f"cannot listen on {path}: the path exists and is not a socket; remove it, or set host to another path"
        )
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:  # left behind by a server that was killed
            path.unlink()
        except OSError as error:
            raise ListenError(f"cannot listen on {path} ({error.strerror})") from error
        else:
            raise ListenError(f"cannot listen on {path}: another server is using it; set host to another path")
