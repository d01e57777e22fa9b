"""Calling a server: what its address may look like, and gRPC channels to it.

Generated clients need none of this. It is what ours do: servers on this machine are called without a proxy, and calls
that may be repeated are, when the server that took them is gone.
"""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

_UNIX = "unix:"
#: The variables by which gRPC finds a proxy, the first that is set; `no_proxy` lists what it leaves out.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
#: A ranking changes nothing, and an action is stored once however often it is sent. So a call whose server went away
#: (UNAVAILABLE) is made again, at most three times within its deadline. docs/operations.md shows this to frontends.
SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [
        {
            "name": [
                {"service": "pinrank.v1.RankingService"},
                {"service": "pinrank.v1.ActivityService", "method": "Record"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.01s",
                "maxBackoff": "0.2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


class AddressError(ValueError):
    """This is no address of a server; the message says what one looks like."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is.

    Attributes:
        target: the address as gRPC takes it.
        here: it is this machine, by a loopback address or a Unix socket.
    """

    target: str
    here: bool

    def proxy(self) -> str | None:
        """Return the variable that names the proxy which calls to there may go through; its value is nobody's."""
        return None if self.here else next((name for name in _PROXIES if os.environ.get(name)), None)

    def unanswered(self, details: str | None = None) -> str:
        """Say that no server answers there, with the details of the call's status, and what may be the reason."""
        proxy = self.proxy()
        through = f" through the proxy of {proxy} (no_proxy lists what goes without)" if proxy else ""
        why = f" ({details})" if details else ""
        return f"no server answers at {self.target}{through}{why}; start one with `pinrank serve`, or set --address"


def parse_address(text: str) -> Address:
    """Read `host:port`, `[IPv6 address]:port` or `unix:/path`.

    Raises:
        AddressError: it is none of them.
    """
    if text.startswith(_UNIX):
        path = text.removeprefix(_UNIX)
        if not path.startswith("/"):
            raise AddressError(f"{text!r}: write unix: and an absolute path, for example unix:/run/pinrank.sock")
        return Address(text, here=True)
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    form = "write host:port, for example 127.0.0.1:50051 or [::1]:50051"
    if not (port.isascii() and port.isdecimal() and 0 < int(port) <= 65_535):
        raise AddressError(f"{text!r}: {form}")
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        if host != bare or not host or set(host) & set(":/[]@ "):
            raise AddressError(f"{text!r}: {form}, without a scheme") from None
        return Address(text, here=host == "localhost")
    if address.version == 6 and host == bare:
        raise AddressError(f"{text!r}: write an IPv6 address in brackets: [{bare}]:{port}")
    # What a server listens on when it listens everywhere is called on this machine too.
    return Address(text, here=address.is_loopback or address.is_unspecified)


def open_channel(address: str, *, retry: bool = False) -> grpc.Channel:
    """Open a channel for blocking calls. Raises AddressError.

    Args:
        address: as for `parse_address`.
        retry: whether calls that may be repeated are, as `SERVICE_CONFIG` says.
    """
    parsed = parse_address(address)
    return grpc.insecure_channel(parsed.target, _options(parsed, retry=retry))


def open_aio_channel(address: str, *, retry: bool = False) -> grpc.aio.Channel:
    """Open a channel for the running event loop; as `open_channel`."""
    parsed = parse_address(address)
    return grpc.aio.insecure_channel(parsed.target, _options(parsed, retry=retry))


def _options(address: Address, *, retry: bool) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", int(not address.here))]
    if retry:
        options.append(("grpc.service_config", json.dumps(SERVICE_CONFIG)))
    return options
