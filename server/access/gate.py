"""Lets calls in: finds out who calls, whether that caller may, and whether its quotas allow it. One event loop's."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog

from pinrank.tokens import BEARER, CREDENTIALS, SPOKEN_FOR
from server.access.caller_file import read_callers
from server.access.callers import ADMIN, NOBODY, Caller, Permission, Unit, keep_used, token_digest, unnamed
from server.access.jwts import JwtError, JwtVerifier
from server.access.tokens import TokenDigest
from server.config import ConfigError
from server.errors import QuotaError, StatusError

if TYPE_CHECKING:
    from server.scheduling.lanes import Lane
    from server.telemetry.metrics import CallerMetrics

_log = structlog.get_logger(__name__)
_audit = structlog.get_logger("audit")

_Context = grpc.aio.ServicerContext[Any, Any]
#: Lets a call of a method in, or raises a RankError.
Door = Callable[[str, _Context], None]
#: Who makes the call that this task answers.
CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)

#: Verified JWTs that are remembered, so that each is verified once.
_REMEMBERED = 4_096
_SHOWN_MAX = 200
_FIXES = {"requests": "requests_per_s", "rows": "rows_per_s", "actions": "actions_per_s"}


class Gate:
    """Decides about each call before anything else is done for it."""

    def __init__(
        self,
        callers_file: Path | None,
        admin_token: TokenDigest | None,
        metrics: CallerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a gate.

        Args:
            callers_file: names the callers; without it, everybody may do everything but manage models.
            admin_token: the token of who may manage models; None if there is none.
            metrics: counts the calls of each caller.
            clock: the clock of the quotas.

        Raises:
            ConfigError: the file is invalid; the message says why.
        """
        self._file = callers_file
        self._admin_token = admin_token
        self._metrics = metrics
        self._clock = clock
        self._callers = unnamed()
        self._verifier: JwtVerifier | None = None
        self._content = b""
        #: Callers by their JWT, with its end in Unix time; the one used last is at the end.
        self._by_jwt: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()
        #: Callers by the `authorization` of a token in the file, so that it need not be hashed again.
        self._by_value: dict[bytes, Caller] = {}
        self.reload()

    def reload(self) -> bool:
        """Read the file of callers again; return whether it has changed.

        Raises:
            ConfigError: the file is invalid; the callers stay as they were.
        """
        if self._file is None:
            return False
        callers, verifier, content = read_callers(self._file)
        if content == self._content:
            return False
        for flow, caller in callers.by_flow.items():  # what a caller has used, it has used under new settings too
            if (before := self._callers.by_flow.get(flow)) is not None:
                keep_used(caller.quotas, before.quotas)
        keep_used(callers.anonymous.quotas, self._callers.anonymous.quotas)
        self._callers, self._verifier, self._content = callers, verifier, content
        self._by_jwt.clear()
        self._by_value.clear()
        return True

    async def follow(self, every_s: float) -> None:
        """Take over each change of the file of callers; one that is invalid is logged and counted, and changes nothing.

        Does not return.
        """
        said = ""
        while True:
            await asyncio.sleep(every_s)
            try:
                if self.reload():
                    self._metrics.reloads_done.inc()
                    _log.info("callers_reloaded", callers=sorted(one.name for one in self._callers.by_flow.values()))
                said = ""
            except ConfigError as error:
                if str(error) != said:
                    said = str(error)
                    self._metrics.reloads_failed.inc()
                    _log.error("callers_not_reloaded", reason=said, serving_with="those before")

    def claim_of(self, flow: str) -> Lane:
        """Return a caller's claim on the engine, by `Caller.flow`."""
        caller = self._callers.by_flow.get(flow)
        return (caller or self._callers.anonymous.from_peer("")).claim

    def door(self, permission: Permission) -> Door:
        """Return the door of a service: it lets a call in, before anything of the request is read, and sets `CALLER`.

        The door raises StatusError if the call has no identity, or a wrong one, or its caller may not do this; and
        QuotaError if the caller has used its quota of requests.
        """

        def enter(method: str, context: _Context) -> None:
            try:
                caller = self.check(context, permission)
                self.charge(caller, "requests", 1)
            except (StatusError, QuotaError) as error:
                if permission is Permission.MODELS:
                    # An event of its own, so that many of them cannot crowd out calls that were let in.
                    code = error.code if isinstance(error, StatusError) else grpc.StatusCode.RESOURCE_EXHAUSTED
                    _audit.info(
                        "model_call_refused", method=method, peer=context.peer(), outcome=code.name, reason=str(error)
                    )
                raise
            self._metrics.count(caller.name, "admitted")
            CALLER.set(caller)

        return enter

    def check(self, context: _Context, permission: Permission) -> Caller:
        """Return who calls. Raises StatusError as a door does; a long call asks again, as a file may have changed."""
        try:
            caller = self._caller_of(context, permission)
        except StatusError as error:
            if error.code is not grpc.StatusCode.PERMISSION_DENIED:  # of a known caller, and counted as its
                self._metrics.count("unknown", "unauthenticated")
            raise
        self.require(caller, permission)
        return caller

    def require(self, caller: Caller, permission: Permission) -> None:
        """Raise StatusError with PERMISSION_DENIED if a caller may not do something."""
        if permission not in caller.may:
            self._metrics.count(caller.name, "denied")
            raise self._denied(caller, permission)

    def is_proxy(self, auth_context: Mapping[str, Sequence[bytes]]) -> bool:
        """Whether the names in a certificate are those of a caller that speaks for others."""
        found = map(self._callers.by_certificate.get, _names_in(auth_context))
        return any(caller is not None and caller.speaks_for_others for caller in found)

    def charge(self, caller: Caller, unit: Unit, amount: int) -> None:
        """Take an amount from a caller's quota of a unit, if it has one. Raises QuotaError."""
        bucket = caller.quotas.get(unit)
        if bucket is None:
            return
        wait_s = bucket.wait_s(amount, self._clock())
        if wait_s > 0:
            self._metrics.count(caller.name, f"over_quota_of_{unit}")
            raise QuotaError(
                f"caller {caller.name!r} has used its quota of {bucket.per_s:g} {unit} a second ({_FIXES[unit]})",
                wait_s,
            )
        bucket.take(amount)

    def _caller_of(self, context: _Context, permission: Permission) -> Caller:
        callers = self._callers
        managing = permission is Permission.MODELS
        if not callers.are_named and not managing:
            return callers.anonymous.from_peer(context.peer())
        certified = _names_in(context.auth_context()) if callers.by_certificate else ()
        connected = next(filter(None, map(callers.by_certificate.get, certified)), None)
        tokens, names = _credentials(context)
        if connected is not None and connected.speaks_for_others:
            _note_proxy(connected)
        if tokens:
            caller = self._by_authorization(tokens)
        else:
            caller = connected or self._without_identity(context, certified, managing=managing)
        if names and callers.are_named:
            return self._spoken_for(caller, connected, names)
        return caller

    def _spoken_for(self, caller: Caller, connected: Caller | None, names: Sequence[bytes]) -> Caller:
        """Return the caller that a proxy names; `connected` is who has the connection's certificate."""
        if caller.speaks_for_others:
            _note_proxy(caller)
        else:
            # A token says more than a certificate: that of a call which a proxy passes on, too.
            if connected is not None and connected.speaks_for_others:
                return replace(caller, via=connected.name)
            self._metrics.count(caller.name, "denied")
            raise StatusError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"caller {caller.name!r} may not speak for others: do not send {SPOKEN_FOR}, or, if it is a proxy, set "
                "`speaks_for_others = true` for it in the server's callers_file",
            )
        if len(names) > 1:
            raise StatusError(
                grpc.StatusCode.UNAUTHENTICATED,
                f"{SPOKEN_FOR} is there {len(names)} times; the proxy {caller.name!r} must replace what clients send",
            )
        name = names[0].decode(errors="replace")
        if (found := self._callers.named(name)) is None:
            raise StatusError(
                grpc.StatusCode.UNAUTHENTICATED,
                f"{SPOKEN_FOR} {name[:_SHOWN_MAX]!r}, which {caller.name!r} sends, is neither the name of a caller "
                "in callers_file nor one of its `certificates`",
            )
        return replace(found, via=caller.name)

    def _without_identity(self, context: _Context, certified: Sequence[str], *, managing: bool) -> Caller:
        if managing:
            raise self._no_identity()
        if not self._callers.anonymous.may:
            known = f"; the names in its certificate are {', '.join(certified)}" if certified else ""
            raise StatusError(
                grpc.StatusCode.UNAUTHENTICATED,
                f"this server answers only callers that it knows{known}: send `authorization: Bearer TOKEN` as "
                "metadata, or a client certificate, of a caller in callers_file",
            )
        return self._callers.anonymous.from_peer(context.peer())

    def _no_identity(self) -> StatusError:
        if self._admin_token is None and not self._callers.are_named:
            return StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "ModelService is disabled on this server; set admin_token_file, or a caller that may `models`",
            )
        return StatusError(
            grpc.StatusCode.UNAUTHENTICATED, "send the server's token as metadata `authorization: Bearer TOKEN`"
        )

    def _by_authorization(self, values: Sequence[bytes]) -> Caller:
        """Return the caller with a token. A wrong one never counts as none, and neither do several."""
        if self._admin_token is None and not self._callers.are_named:
            raise self._no_identity()
        if len(values) > 1:
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, "`authorization` is there twice; send one token")
        given = values[0]
        if (known := self._by_value.get(given)) is not None:
            return known
        if self._admin_token is not None and self._admin_token.is_in(given):
            return ADMIN
        if given.startswith(BEARER):
            token = given[len(BEARER) :]
            digest = token_digest(token)
            # A lookup by digest tells nothing of the tokens by the time that it takes.
            if caller := self._callers.by_token.get(digest):
                self._by_value[given] = caller  # there are no more of them than in the file
                return caller
            if self._verifier is not None and token.count(b".") == 2:  # the three parts of a JWT
                return self._by_jwt_of(digest, token)
        raise StatusError(
            grpc.StatusCode.UNAUTHENTICATED,
            "the token is not that of a caller; send a valid one as metadata `authorization: Bearer TOKEN`",
        )

    def _by_jwt_of(self, digest: bytes, token: bytes) -> Caller:
        assert self._verifier is not None  # noqa: S101 - checked by the only place that calls this
        now = time.time()
        if (known := self._by_jwt.get(digest)) is not None and now < known[1]:
            self._by_jwt.move_to_end(digest)
            return known[0]
        try:
            verified = self._verifier.verified(token.decode("ascii", "replace"))
        except JwtError as error:
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, f"the token is not valid: {error}") from error
        caller = self._callers.by_subject.get(verified.subject)
        if caller is None:
            raise StatusError(
                grpc.StatusCode.UNAUTHENTICATED, "the token is valid, and its subject is none of a caller's `subjects`"
            )
        self._by_jwt[digest] = caller, verified.expires_at
        if len(self._by_jwt) > _REMEMBERED:
            self._by_jwt.popitem(last=False)
        return caller

    @staticmethod
    def _denied(caller: Caller, permission: Permission) -> StatusError:
        may = ", ".join(sorted(caller.may)) or "nothing"
        return StatusError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"caller {caller.name!r} may not {permission} (it may: {may}); the server's callers_file says who may",
        )


def _note_proxy(proxy: Caller) -> None:
    """Note who passes the call on, so that a refusal is not held against the proxy's connection."""
    CALLER.set(replace(NOBODY, via=proxy.name))


def _credentials(context: _Context) -> Sequence[list[bytes]]:
    """Return the values of each of `CREDENTIALS` in a call's metadata."""
    if (credentials := getattr(context, "credentials", None)) is not None:  # of our own port
        found: tuple[list[bytes], ...] = credentials()
        return found
    metadata: Any = context.invocation_metadata() or ()
    return [
        [
            value if isinstance(value, bytes) else value.encode(errors="replace")
            for key, value in metadata
            if key == name.decode()
        ]
        for name in CREDENTIALS
    ]


def _names_in(certificate: Any) -> tuple[str, ...]:
    """Return the names in a verified client certificate: the alternative ones, or the common name if it has none.

    An authority may let clients choose the common name, and check only the alternative ones (RFC 9525, 2).
    """
    alternative = certificate.get("x509_subject_alternative_name", ())
    given = alternative or certificate.get("x509_common_name", ())
    return tuple(name.decode(errors="replace") for name in given if name)
