"""How our own clients speak TLS: their options, and what they say of a server that does not answer them."""

from __future__ import annotations

import functools
import inspect
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import grpc

#: Instead of a file: the public authorities that gRPC knows.
SYSTEM = "system"
_PROBE_S = 2.0


class TlsOptionError(ValueError):
    """The options for TLS contradict each other or name a file that cannot be used; the message says which."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """A client's side of TLS.

    Attributes:
        ca: PEM file of the authorities that may have signed the server's certificate, or `system`.
        certificate: the client's own certificate with its chain, if the server asks for one (PEM file).
        key: its private key (PEM file).
        name: the name to expect in the server's certificate, instead of the host of its address.
    """

    ca: str
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return credentials for a channel. Raises TlsOptionError."""
        # Only here: commands have these options before they need gRPC, and `serve` sets variables that gRPC reads.
        import grpc  # noqa: PLC0415

        return grpc.ssl_channel_credentials(
            None if self.ca == SYSTEM else _read("--tls-ca", Path(self.ca)),
            None if self.key is None else _read("--tls-key", self.key),
            None if self.certificate is None else _read("--tls-cert", self.certificate),
        )

    def options(self) -> list[tuple[str, Any]]:
        """Return the channel's further options."""
        return [] if self.name is None else [("grpc.ssl_target_name_override", self.name)]

    def context(self) -> ssl.SSLContext:
        """Return the same for Python's own sockets. Raises TlsOptionError."""
        try:
            context = ssl.create_default_context(cafile=None if self.ca == SYSTEM else self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:  # of the file, or of OpenSSL
            raise TlsOptionError(f"cannot use {self.ca}, {self.certificate} and {self.key}: {error}") from error
        context.set_alpn_protocols(["h2"])
        return context


def client_tls(ca: str | None, certificate: Path | None, key: Path | None, name: str | None) -> ClientTls | None:
    """Return what the options say; None for plain text. Raises TlsOptionError."""
    if ca is None:
        for option, value in (("--tls-cert", certificate), ("--tls-key", key), ("--tls-name", name)):
            if value is not None:
                raise TlsOptionError(f"{option} needs --tls-ca: the authority of the server, a PEM file or {SYSTEM}")
        return None
    if (certificate is None) != (key is None):
        raise TlsOptionError("--tls-cert and --tls-key go together: set both, or neither")
    found = ClientTls(ca, certificate, key, name)
    found.context()
    return found


_OPTIONS = {
    "tls_ca": Annotated[
        str | None,
        typer.Option(
            envvar="PINRANK_TLS_CA",
            help=f"Call the server with TLS: PEM file of the authority that signed its certificate, or {SYSTEM}.",
        ),
    ],
    "tls_cert": Annotated[
        Path | None,
        typer.Option(envvar="PINRANK_TLS_CERT", help="The client's own certificate, if the server wants one."),
    ],
    "tls_key": Annotated[Path | None, typer.Option(envvar="PINRANK_TLS_KEY", help="The key of --tls-cert.")],
    "tls_name": Annotated[
        str | None,
        typer.Option(envvar="PINRANK_TLS_NAME", help="Name in the server's certificate, if not the address's host."),
    ],
}


def with_tls_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options --tls-ca, --tls-cert, --tls-key and --tls-name; it gets them as its argument `tls`."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for name, one in signature.parameters.items() if name != "tls"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        ca, certificate, key, name = (arguments.pop(option) for option in _OPTIONS)
        try:
            tls = client_tls(ca, certificate, key, name)
        except TlsOptionError as error:
            raise typer.BadParameter(str(error)) from error
        command(**arguments, tls=tls)

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *added)]
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options


def diagnosis(target: str, tls: ClientTls | None) -> str | None:
    """Say why a client and a server that listens do not understand each other, as far as TLS is the reason.

    gRPC says only that the connection failed. This makes connections of its own, for at most a few seconds.

    Args:
        target: host:port or unix:/path.
        tls: how the client calls it.

    Returns:
        What is wrong and how to fix it; None if TLS is not the reason, or nothing listens there.
    """
    speaks = _speaks_tls(target)
    if speaks is None:
        return None
    if tls is None:
        return f"the server at {target} speaks TLS: set --tls-ca to its authority (PINRANK_TLS_CA)" if speaks else None
    if not speaks:
        return f"the server at {target} speaks no TLS: unset --tls-ca (PINRANK_TLS_CA), or set its tls.certificate"
    return _refusal(target, tls)


def _refusal(target: str, tls: ClientTls) -> str | None:
    """Say why one of two, who both speak TLS, does not trust the other."""
    given = "another" if tls.certificate else "a"
    wants = (
        f"the server at {target} closes the connection after the handshake; it may want {given} client certificate: "
        "set --tls-cert and --tls-key (PINRANK_TLS_CERT, PINRANK_TLS_KEY) to one that its tls.client_ca signed"
    )
    try:
        with _connected(target) as plain:
            name = tls.name or _host(target)
            with tls.context().wrap_socket(plain, server_hostname=name) as secured:
                return None if secured.recv(1) else wants
    except ssl.SSLCertVerificationError as error:
        return (
            f"the certificate of the server at {target} is not trusted ({error.verify_message}): check --tls-ca, and "
            "--tls-name if it is for another name"
        )
    except TimeoutError:
        return None
    except OSError:
        return wants


def _speaks_tls(target: str) -> bool | None:
    """Return whether a server answers a TLS handshake; None if nothing answers at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _connected(target) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLEOFError:
        return None
    except ssl.SSLError as error:
        # An alert is TLS as well.
        return "ALERT" in (error.reason or "")
    except OSError:
        return None


def _connected(target: str) -> socket.socket:
    if target.startswith("unix:"):
        plain = socket.socket(socket.AF_UNIX)
        plain.settimeout(_PROBE_S)
        plain.connect(target.removeprefix("unix:"))
        return plain
    host, _, port = target.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S)


def _host(target: str) -> str:
    return "localhost" if target.startswith("unix:") else target.rpartition(":")[0].strip("[]")


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsOptionError(f"{option} {path}: {error.strerror}") from error
