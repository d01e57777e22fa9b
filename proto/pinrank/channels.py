"""Parse server addresses, and open gRPC channels to them.

Our own clients use this; any gRPC channel works as well. These channels bypass proxies for servers on this machine and,
on request, retry idempotent calls when a server becomes unavailable.
"""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from pinrank.tls import ClientTls, diagnosis

_UNIX = "unix:"
#: Variables in which gRPC looks for a proxy; the first that is set counts. `no_proxy` lists exceptions.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
#: Rank changes nothing and Record is idempotent, so both are safe to retry: after UNAVAILABLE, at most three times
#: within the deadline, and not while more than about one call in ten fails. RESOURCE_EXHAUSTED is not retried: the
#: server is overloaded or a quota used up, and says itself when to come back. docs/operations.md recommends the same to
#: frontends.
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
    ],
    # A failed call takes a token, an answered one brings a tenth back; at half of all tokens retries stop.
    "retryThrottling": {"maxTokens": 200, "tokenRatio": 0.1},
}


class AddressError(ValueError):
    """The text is not a server address. The message shows a valid one."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a server.

    Attributes:
        target: the address in gRPC's syntax.
        here: whether it is on this machine: a loopback address or a Unix socket.
    """

    target: str
    here: bool

    def proxy(self) -> str | None:
        """Return the variable of the proxy that calls may use, without its value, which may hold a password."""
        return None if self.here else next((name for name in _PROXIES if os.environ.get(name)), None)

    def unanswered(self, details: str | None = None, tls: ClientTls | None = None) -> str:
        """Return the message for an unavailable server: its address, any proxy, the status details and the fix.

        It connects to the address to find out whether TLS is the reason, for a few seconds at most.
        """
        proxy = self.proxy()
        reason = None if proxy else diagnosis(self.target, tls)
        if reason is not None:
            return reason
        through = f" through the proxy of {proxy} (no_proxy lists exceptions)" if proxy else ""
        why = f" ({details})" if details else ""
        return f"no server answers at {self.target}{through}{why}; start one with `pinrank serve`, or set --address"


def parse_address(text: str) -> Address:
    """Read `host:port`, `[IPv6 address]:port` or `unix:/path`.

    Raises:
        AddressError: the text has another form.
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
    # The wildcard address that a server may listen on reaches a server on this machine.
    return Address(text, here=address.is_loopback or address.is_unspecified)


def open_channel(address: str, *, retry: bool = False, tls: ClientTls | None = None) -> grpc.Channel:
    """Open a channel for blocking calls.

    Args:
        address: see `parse_address`.
        retry: whether to retry idempotent calls, as `SERVICE_CONFIG` says.
        tls: how to speak TLS; without it, the channel speaks plain text.

    Raises:
        AddressError: the text is not an address.
        TlsOptionError: a file of `tls` cannot be read.
    """
    parsed = parse_address(address)
    options = _options(parsed, tls, retry=retry)
    if tls is None:
        return grpc.insecure_channel(parsed.target, options)
    return grpc.secure_channel(parsed.target, tls.credentials(), options)


def open_aio_channel(address: str, *, retry: bool = False, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """Open a channel for the running event loop. See `open_channel`."""
    parsed = parse_address(address)
    options = _options(parsed, tls, retry=retry)
    if tls is None:
        return grpc.aio.insecure_channel(parsed.target, options)
    return grpc.aio.secure_channel(parsed.target, tls.credentials(), options)


def _options(address: Address, tls: ClientTls | None, *, retry: bool) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", int(not address.here))]
    if tls is not None:
        options += tls.options()
    if retry:
        options.append(("grpc.service_config", json.dumps(SERVICE_CONFIG)))
    return options
