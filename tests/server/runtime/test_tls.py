"""Certificate files: which are served, which are refused and why, and what becomes of changes."""

from __future__ import annotations

import datetime as dt
import ssl

import pytest
from cryptography.hazmat.primitives import serialization

from server.runtime.tls import Certificates, TlsError, TlsFiles
from tests.certificates import Authority, Mounted


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


def test_the_certificate_that_is_served_is_told_apart_by_serial_and_expiry(authority):
    pair = authority.server()
    loaded = TlsFiles(pair.certificate, pair.key).load()
    assert loaded.serial == pair.serial
    left = dt.datetime.fromtimestamp(loaded.expires_at_s, dt.UTC) - dt.datetime.now(dt.UTC)
    assert dt.timedelta(hours=23) < left < dt.timedelta(hours=25)
    assert pair.key.read_text() not in repr(loaded)


def test_an_expired_certificate_is_served_and_its_expiry_shown(authority):
    pair = authority.server(valid=-dt.timedelta(days=1))
    loaded = TlsFiles(pair.certificate, pair.key).load()
    assert loaded.expires_at_s < dt.datetime.now(dt.UTC).timestamp()


def test_clients_are_asked_for_certificates_on_the_grpc_port_only(authority):
    pair = authority.server()
    modes = {"off": ssl.CERT_NONE, "ask": ssl.CERT_OPTIONAL, "require": ssl.CERT_REQUIRED}
    for clients, mode in modes.items():
        loaded = TlsFiles(pair.certificate, pair.key, authority.file, clients).load()
        assert (loaded.grpc.verify_mode, loaded.http.verify_mode) == (mode, ssl.CERT_NONE)


def test_files_with_other_text_around_the_certificates_are_read(authority):
    pair = authority.server()
    for path in (pair.certificate, authority.file):
        path.write_bytes("Zürich, Straße 1\n".encode() + path.read_bytes() + b"\nthe end\n")
    assert TlsFiles(pair.certificate, pair.key, authority.file, "require").load().serial == pair.serial


def encrypted(pair):
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    pair.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pair, other, _: pair.key.write_bytes(other.key.read_bytes()), r"its key .*KEY_VALUES_MISMATCH"),
        (lambda pair, *_: pair.certificate.write_text("no certificate"), "cannot be used .* must be PEM files"),
        (lambda pair, *_: pair.key.write_text(""), "cannot be used .* must be PEM files"),
        (lambda pair, *_: encrypted(pair), "without a passphrase"),
        (lambda pair, *_: pair.certificate.unlink(), "certificate: cannot read .*server.crt .No such file"),
        (lambda pair, *_: pair.key.unlink(), "key: cannot read .*server.key .No such file"),
        (lambda _, __, ca: ca.write_text("none here"), "client_ca: .*authority.pem holds no certificates in PEM"),
        (lambda _, __, ca: ca.unlink(), "client_ca: cannot read .*authority.pem"),
    ],
    ids=[
        "foreign key",
        "no certificate",
        "empty key",
        "passphrase",
        "lost",
        "key lost",
        "no authority",
        "authority lost",
    ],
)
def test_files_that_cannot_be_served_are_named(authority, damage, message):
    pair, other = authority.server(), authority.server("other")
    damage(pair, other, authority.file)
    with pytest.raises(TlsError, match=message):
        TlsFiles(pair.certificate, pair.key, authority.file, "require").load()


def test_a_certificate_that_no_client_accepts_is_refused(authority):
    pair = authority.client()
    with pytest.raises(TlsError, match="clients cannot connect with .*it must be one for servers"):
        TlsFiles(pair.certificate, pair.key).load()


def test_changed_files_are_served_and_broken_ones_refused_once(authority, tmp_path):
    first, second = authority.server("first"), authority.server("second")
    mounted = Mounted(tmp_path / "mounted", first, authority.file)
    served = Certificates(TlsFiles(mounted.certificate, mounted.key, mounted.client_ca, "require"))
    before = served.current
    served.renew()
    assert served.current is before
    broken = type(first)(first.certificate, second.key, "")
    mounted.show(broken, authority.file)
    with pytest.raises(TlsError, match="KEY_VALUES_MISMATCH"):
        served.renew()
    served.renew()
    assert served.current is before
    mounted.show(second, authority.file)
    served.renew()
    assert (before.serial, served.current.serial) == (first.serial, second.serial)
    mounted.show(broken, authority.file)
    with pytest.raises(TlsError, match="KEY_VALUES_MISMATCH"):
        served.renew()


def test_files_that_are_gone_are_reported_once_until_they_are_back(authority):
    pair = authority.server()
    served = Certificates(TlsFiles(pair.certificate, pair.key))
    content = pair.key.read_bytes()
    for _ in range(2):
        pair.key.unlink()
        with pytest.raises(TlsError, match="key: cannot read"):
            served.renew()
        served.renew()
        pair.key.write_bytes(content)
        served.renew()
    assert served.current.serial == pair.serial
