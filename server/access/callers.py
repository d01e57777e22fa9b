"""Callers: their names, what they may do, and how much of it."""

from __future__ import annotations

import hashlib
import ipaddress
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Literal

from server.access.token_bucket import TokenBucket
from server.scheduling.lanes import Lane


class Permission(StrEnum):
    """What a caller may do."""

    RANK = "rank"
    LABELS = "labels"
    RECORD = "record"
    SEEN = "seen"
    MODELS = "models"
    REFLECTION = "reflection"


#: What a caller's quotas count.
Unit = Literal["requests", "rows", "actions"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who calls.

    Attributes:
        name: its name in metrics and logs.
        may: what it may do.
        claim: its claim on the engine's time, beside the other callers of a surface.
        quotas: by unit, how much it may use; a unit without a bucket is not limited.
        flow: who it is to the scheduler. It differs from the name for calls without an identity: these share their
            quotas, but each machine that they come from has a share of its own.
        speaks_for_others: whether its calls are those of the callers that it names in `x-pinrank-caller`: a proxy.
        via: the proxy that named this caller, if one did.
    """

    name: str
    may: frozenset[Permission]
    claim: Lane = field(default_factory=Lane)
    quotas: dict[Unit, TokenBucket] = field(default_factory=dict)
    flow: str = ""
    speaks_for_others: bool = False
    via: str = ""

    @property
    def route(self) -> str:
        """Its name, and that of the proxy that it calls through, for logs."""
        return f"{self.name} via {self.via}" if self.via else self.name


#: Calls without an identity are spread over so many flows, to bound what the scheduler must compare.
_FLOWS = 64
#: What everybody may do if no callers are named.
EVERYTHING_BUT_MODELS = frozenset(Permission) - {Permission.MODELS}
#: The server itself, and tests.
NOBODY = Caller("", frozenset(Permission))
#: The caller with the token of `admin_token_file`.
ADMIN = Caller("admin", frozenset({Permission.MODELS, Permission.REFLECTION}))


class Anonymous:
    """Calls without an identity."""

    def __init__(
        self, may: frozenset[Permission], claim: Lane | None = None, quotas: dict[Unit, TokenBucket] | None = None
    ) -> None:
        self.may, self.quotas = may, quotas or {}
        # They share one claim, or whoever has many machines would have many shares.
        shared = replace(claim or Lane(), group="anonymous")
        self._by_flow = tuple(Caller("anonymous", may, shared, self.quotas, f"anonymous {i}") for i in range(_FLOWS))

    def from_peer(self, peer: str) -> Caller:
        """Return the caller that a connection from an address is, as gRPC writes addresses."""
        return self._by_flow[hash(origin(peer)) % _FLOWS]


@lru_cache(maxsize=4_096)
def origin(peer: str) -> str:
    """Return where a connection without an identity comes from: the machine, or this machine's connection itself.

    Connections cost a client nothing, and neither do the addresses of an IPv6 network of 64 bits, so they count as one.
    """
    kind, _, address = urllib.parse.unquote(peer).partition(":")
    host = address.rpartition(":")[0].strip("[]")
    if kind not in ("ipv4", "ipv6"):
        return peer
    try:
        found = ipaddress.ip_address(host)
    except ValueError:  # no address: count the connection
        return peer
    found = getattr(found, "ipv4_mapped", None) or found
    if found.is_loopback:
        return peer
    return str(found if found.version == 4 else ipaddress.ip_network((found, 64), strict=False))


@dataclass(frozen=True, slots=True)
class Callers:
    """All callers by what they identify themselves with.

    Attributes:
        anonymous: who has no identity.
        by_certificate: by a name in the client's certificate.
        by_token: by the SHA-256 of a bearer token.
        by_subject: by the subject of a JWT.
        by_flow: by `Caller.flow`.
    """

    anonymous: Anonymous
    by_certificate: Mapping[str, Caller] = field(default_factory=dict)
    by_token: Mapping[bytes, Caller] = field(default_factory=dict)
    by_subject: Mapping[str, Caller] = field(default_factory=dict)
    by_flow: Mapping[str, Caller] = field(default_factory=dict)

    def named(self, name: str) -> Caller | None:
        """Return the caller that a proxy names: by a name in its certificate, or by its own; None if there is none."""
        return self.by_certificate.get(name) or self.by_flow.get(name)

    @property
    def are_named(self) -> bool:
        """Whether calls can have an identity."""
        return bool(self.by_flow)


def unnamed() -> Callers:
    """Return the callers of a server whose settings name none."""
    return Callers(Anonymous(EVERYTHING_BUT_MODELS))


def token_digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def keep_used(new: dict[Unit, TokenBucket], before: Mapping[Unit, TokenBucket]) -> None:
    """Keep the buckets of quotas that have not changed, with what is in them."""
    for unit, bucket in new.items():
        known = before.get(unit)
        if known is not None and (known.per_s, known.size) == (bucket.per_s, bucket.size):
            new[unit] = known


def buckets(per_s: Mapping[Unit, float | None], burst_s: float) -> dict[Unit, TokenBucket]:
    """Return full buckets for the units that have a rate."""
    now_s = time.monotonic()
    return {unit: TokenBucket(rate, burst_s, now_s) for unit, rate in per_s.items() if rate is not None}
