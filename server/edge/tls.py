"""TLS on the gRPC port: who a client is, by its certificate, and handshakes that fail."""

from __future__ import annotations

import socket
import ssl
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import structlog

from server.config import ConfigError, ServerConfig
from server.runtime.tls import Certificates, TlsError
from server.telemetry.metrics import TlsMetrics

_log = structlog.get_logger(__name__)

#: Time for a client to complete its handshake.
HANDSHAKE_S_MAX = 5.0
#: gRPC's names of what a client certificate says.
COMMON_NAME, ALTERNATIVE_NAME = "x509_common_name", "x509_subject_alternative_name"
_IP, _TEXTS = "IP Address", {"DNS", "URI", "email"}


def load_certificates(config: ServerConfig) -> Certificates | None:
    """Load the certificate that the settings name, if any. Raises ConfigError."""
    files = config.tls.files
    if files is None:
        return None
    try:
        certificates = Certificates(files)
    except TlsError as error:
        raise ConfigError(f"tls.{error}") from error
    if files.key.stat().st_mode & stat.S_IROTH:
        _log.warning("tls_key_readable_by_all", key=str(files.key), reason="every user of this machine can read it")
    return certificates


def auth_context(certificate: Mapping[str, Any] | None) -> dict[str, list[bytes]]:
    """Return what grpcio's `ServicerContext.auth_context` says of a verified client certificate: its names.

    Args:
        certificate: as `SSLObject.getpeercert` returns it; None or empty without one.

    Returns:
        The subject's common name, which may be empty, and its alternative names (DNS, URI, email, IP) in the
        certificate's order; nothing without a certificate. For other kinds of names, grpcio has the value `other types
        of SAN`; this has none.
    """
    if not certificate:
        return {}
    common = next((value for part in certificate["subject"] for name, value in part if name == "commonName"), "")
    others = list(_names(certificate.get("subjectAltName", ())))
    return {COMMON_NAME: [common.encode()]} | ({ALTERNATIVE_NAME: others} if others else {})


def _names(names: Iterable[tuple[str, str]]) -> Iterable[bytes]:
    for kind, value in names:
        if kind in _TEXTS:
            yield value.encode()
        elif kind == _IP:
            yield _address(value.strip()).encode()


def _address(text: str) -> str:
    """Return an IP address as gRPC writes it; Python writes out all parts of an IPv6 address."""
    if ":" not in text:
        return text
    return socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text))


@dataclass(frozen=True, slots=True)
class TlsPort:
    """What the gRPC port needs for TLS: the certificates, and the metrics of its handshakes."""

    certificates: Certificates
    metrics: TlsMetrics

    def context(self) -> ssl.SSLContext:
        """Return the present context, made to count its handshakes."""
        context = self.certificates.current.grpc
        context.sslobject_class = _counting(self.metrics)
        return context

    def has_h2(self, secured: ssl.SSLObject) -> bool:
        """Return whether a client that completed its handshake speaks HTTP/2, and count it if it did not say so."""
        if secured.selected_alpn_protocol() == "h2":
            return True
        self.metrics.no_h2.inc()
        _log.warning("tls_client_without_h2", reason="it does not offer HTTP/2 (ALPN), so it speaks no gRPC")
        return False


@cache
def _counting(metrics: TlsMetrics) -> type[ssl.SSLObject]:
    """Return the class of handshakes that count themselves, and log why they fail; an event loop only closes those."""

    class Handshake(ssl.SSLObject):
        _begun = False

        def do_handshake(self) -> None:
            if not self._begun:
                self._begun = True
                metrics.begun.inc()
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                metrics.failed.inc()
                _log.warning("tls_handshake_failed", reason=_why(error))
                raise
            metrics.done.inc()

    return Handshake


def _why(error: ssl.SSLError) -> str:
    """Return what went wrong in a handshake, in OpenSSL's words."""
    return ": ".join(filter(None, (error.reason, getattr(error, "verify_message", None)))) or str(error)
