"""Authorities, and the certificates that they sign, as PEM files."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the extra signing is not installed")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

_DAY = dt.timedelta(days=1)
SERVER_NAMES = (
    x509.DNSName("localhost"),
    x509.DNSName("ranker.example"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, each in a file.

    Attributes:
        serial: the certificate's serial number as OpenSSL prints it.
    """

    certificate: Path
    key: Path
    serial: str


class Authority:
    """Signs certificates, into a folder."""

    def __init__(self, folder: Path, name: str = "authority", above: Authority | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = above or self
        built = _builder(self._name, issuer._name, self._key, _DAY).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        own = built.sign(issuer._key, hashes.SHA256())
        #: The certificate of the authority itself.
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def server(
        self, name: str = "server", names: Sequence[x509.GeneralName] = SERVER_NAMES, valid: dt.timedelta = _DAY
    ) -> Pair:
        return self._sign(name, names, "ranker.example", ExtendedKeyUsageOID.SERVER_AUTH, valid)

    def client(
        self,
        name: str = "client",
        names: Sequence[x509.GeneralName] = (),
        common: str | None = "frontend",
        valid: dt.timedelta = _DAY,
        raw_names: bytes = b"",
    ) -> Pair:
        """Return a client's certificate; `raw_names` is the content of a SubjectAlternativeName (DER)."""
        return self._sign(name, names, common, ExtendedKeyUsageOID.CLIENT_AUTH, valid, raw_names)

    def _sign(
        self,
        name: str,
        names: Sequence[x509.GeneralName],
        common: str | None,
        use: x509.ObjectIdentifier,
        valid: dt.timedelta,
        raw_names: bytes = b"",
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests")]
        subject = x509.Name(parts + ([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else []))
        built = _builder(subject, self._name, key, valid).add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        if names:
            built = built.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if raw_names:
            unchecked = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, raw_names)
            built = built.add_extension(unchecked, critical=False)
        signed = built.sign(self._key, hashes.SHA256())
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key", f"{signed.serial_number:X}")
        pair.certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        pair.key.chmod(0o600)
        return pair


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        # A fixed length: OpenSSL prints no leading zeros, and pads to whole bytes.
        .serial_number(x509.random_serial_number() >> 8 | 1 << 151)
        .not_valid_before(now - 2 * _DAY)
        .not_valid_after(now + valid)
    )


class Mounted:
    """Files as Kubernetes mounts a secret: links through `..data`, which is replaced at once by a rename."""

    def __init__(self, folder: Path, pair: Pair, client_ca: Path) -> None:
        self._folder, self._turn = folder, 0
        folder.mkdir()
        self.show(pair, client_ca)
        self.certificate, self.key, self.client_ca = (folder / name for name in ("tls.crt", "tls.key", "ca.crt"))
        for path in (self.certificate, self.key, self.client_ca):
            path.symlink_to(Path("..data") / path.name)

    def show(self, pair: Pair, client_ca: Path) -> None:
        """Replace all files at once, and delete those that they replace."""
        self._turn += 1
        turn = self._folder / f"..{self._turn}"
        turn.mkdir()
        for name, source in (("tls.crt", pair.certificate), ("tls.key", pair.key), ("ca.crt", client_ca)):
            (turn / name).write_bytes(source.read_bytes())
        link = self._folder / "..data_tmp"
        link.symlink_to(turn.name)
        link.rename(self._folder / "..data")
        before = self._folder / f"..{self._turn - 1}"
        for path in before.glob("*"):
            path.unlink()
        if before.exists():
            before.rmdir()

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PINRANK_TLS__CERTIFICATE": str(self.certificate), "PINRANK_TLS__KEY": str(self.key)}
