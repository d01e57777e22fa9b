"""The server's certificate, its key, and the authorities of its clients: read from files, checked, and read again."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model_store.bundle.plain_files import UnfitFileError, read_plain

#: Files are replaced one after the other, or all at once through a symbolic link: read again so often until they stay.
_READS_MAX = 5
_BYTES_MAX = 4 << 20
_MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_CLIENTS = {"off": ssl.CERT_NONE, "ask": ssl.CERT_OPTIONAL, "require": ssl.CERT_REQUIRED}
#: HTTP/2 forbids the other suites of TLS 1.2 (RFC 9113, 9.2.2).
_HTTP2_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
#: X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which `ssl.VerifyFlags` does not name.
_NO_CHECK_TIME = 0x200000
_PEM = re.compile(rb"-----BEGIN ((?:TRUSTED )?CERTIFICATE)-----.+?-----END \1-----", re.DOTALL)


class TlsError(Exception):
    """The certificate cannot be served; the message names the file, and what to do."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The bytes of the files, in PEM.

    Attributes:
        certificate: the server's certificate, followed by its chain.
        key: its private key.
        client_ca: the authorities whose client certificates are accepted; None if clients are not asked for any.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """What new connections are served with.

    Attributes:
        contents: the files that it was made of.
        grpc: for the gRPC port: speaks HTTP/2, and asks for client certificates.
        http: for the HTTP port, which never asks, because neither Prometheus nor a kubelet has one.
        serial: the certificate's serial number, in hexadecimal.
        expires_at_s: when it expires, in Unix time.
    """

    contents: Contents
    grpc: ssl.SSLContext
    http: ssl.SSLContext
    serial: str
    expires_at_s: float


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where certificate and key are, and how connections use them; see the settings of `[tls]`."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    clients: Literal["off", "ask", "require"] = "off"
    minimum: Literal["1.2", "1.3"] = "1.2"

    def read(self) -> Contents:
        """Read the files. Raises TlsError."""
        found = [_read(name, path) for name, path in self._paths()]
        return Contents(found[0], found[1], found[2] if self.client_ca else None)

    def load(self) -> Loaded:
        """Read the files, and make sure that they belong together and that a client can connect.

        Raises:
            TlsError: they cannot be served.
        """
        for _ in range(_READS_MAX):
            contents = self.read()
            try:
                loaded = self._made_of(contents)
            except TlsError:
                if self.read() == contents:
                    raise
            else:
                if self.read() == contents:
                    return loaded
        raise TlsError(f"{self.certificate} and {self.key} change all the time; replace them once")

    def _paths(self) -> Iterator[tuple[str, Path]]:
        yield "certificate", self.certificate
        yield "key", self.key
        if self.client_ca is not None:
            yield "client_ca", self.client_ca

    def _made_of(self, contents: Contents) -> Loaded:
        grpc, http = self._context(), self._context()
        grpc.set_alpn_protocols(["h2"])
        grpc.set_ciphers(_HTTP2_CIPHERS)
        http.set_alpn_protocols(["http/1.1"])
        if contents.client_ca is not None:
            try:
                grpc.load_verify_locations(cadata=_certificates(contents.client_ca))
            except ssl.SSLError as error:
                raise TlsError(
                    f"client_ca: {self.client_ca} holds no certificates in PEM ({error.reason or error})"
                ) from error
            grpc.verify_mode = _CLIENTS[self.clients]
            # As in gRPC, an authority needs none above it: it may itself be signed by one that is not trusted here.
            grpc.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        serial, expires_at_s = self._shown(http, contents)
        return Loaded(contents, grpc, http, serial, expires_at_s)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _MINIMUM[self.minimum]
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
        # A resumed connection would not show its certificate again, to authorities that may have changed meanwhile.
        context.num_tickets = 0
        try:
            # With the empty password, an encrypted key is an error; without one, OpenSSL would ask the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            raise TlsError(
                f"certificate: {self.certificate} and its key {self.key} cannot be used ({error.reason or error}); "
                "they must be PEM files that belong together, the key without a passphrase, the chain last"
            ) from error
        except OSError as error:  # it was there a moment ago
            raise TlsError(f"certificate: cannot read {self.certificate} and {self.key} ({error.strerror})") from error
        return context

    def _shown(self, server: ssl.SSLContext, contents: Contents) -> tuple[str, float]:
        """Return the serial number and the expiry of the certificate that a client is shown."""
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
        try:
            client.load_verify_locations(cadata=_certificates(contents.certificate))
            shown = _handshake(client, server)
        except ssl.SSLError as error:
            raise TlsError(
                f"certificate: clients cannot connect with {self.certificate} ({error.reason}: "
                f"{getattr(error, 'verify_message', None) or error}); it must be one for servers"
            ) from error
        return str(shown["serialNumber"]), float(ssl.cert_time_to_seconds(str(shown["notAfter"])))


class Certificates:
    """The certificate that is served now. `renew` from one thread; read `current` from any."""

    def __init__(self, files: TlsFiles) -> None:
        """Load the files. Raises TlsError."""
        self.files = files
        self.current = files.load()
        self._refused: tuple[Contents | None, str] | None = None

    def renew(self) -> None:
        """Load the files if they have changed.

        Raises:
            TlsError: they cannot be served, and this was not raised for the same contents before. What was served
                goes on to be.
        """
        contents: Contents | None = None
        try:
            contents = self.files.read()
            if contents != self.current.contents:
                self.current = self.files.load()
        except TlsError as error:
            refused = contents, str(error)
            if refused == self._refused:
                return
            self._refused = refused
            raise
        self._refused = None


def _read(name: str, path: Path) -> bytes:
    try:
        return read_plain(path, _BYTES_MAX, follow_links=True)  # a pipe would hold up the event loop
    except UnfitFileError as error:
        raise TlsError(f"{name}: {path}: {error}") from error
    except OSError as error:
        raise TlsError(f"{name}: cannot read {path} ({error.strerror})") from error


def _certificates(content: bytes) -> str:
    """Return only the certificates of a PEM file, which may hold other text in any encoding; nothing if it has none."""
    return "\n".join(match[0].decode("ascii", "replace") for match in _PEM.finditer(content)) or "none"


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, object]:
    """Let a client connect to a server in memory; return the certificate that it is shown. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    sides = asking, server.wrap_bio(to_server, to_client, server_side=True)
    waiting = True
    while waiting:
        waiting = False
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                waiting = True
    return dict(asking.getpeercert() or {})
