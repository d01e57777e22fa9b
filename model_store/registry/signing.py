"""Sign versions and verify who published them: Ed25519 signatures (RFC 8032) of a version's name and digest.

Create a key pair with:

openssl genpkey -algorithm ed25519 -out publisher.pem
openssl pkey -in publisher.pem -pubout -out publisher.pub.pem
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


_NO_LIBRARY = "signatures need cryptography: pip install 'pinrank[signing]'"


class SigningError(Exception):
    """A key cannot be used, or no trusted publisher signed the version. The message says which."""


class Signer:
    """A publisher's private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def read(cls, path: Path) -> Signer:
        """Read a PEM file. Raises SigningError."""
        try:
            from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
            from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
        except ImportError as error:
            raise SigningError(_NO_LIBRARY) from error
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, TypeError, ValueError) as error:
            raise SigningError(f"{path} is not an unencrypted PEM private key: {error}") from error
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise SigningError(f"{path} is not an Ed25519 key; create one: openssl genpkey -algorithm ed25519")
        return cls(key)

    def sign(self, ref: str, digest: str) -> str:
        """Return the signature of a version, in base64."""
        return base64.b64encode(self._key.sign(_message(ref, digest))).decode()


class TrustedKeys:
    """The public keys of the trusted publishers, whose bundles may be served."""

    def __init__(self, keys: Sequence[Ed25519PublicKey]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> TrustedKeys:
        """Read PEM files. Raises SigningError."""
        try:
            from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
            from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
        except ImportError as error:
            raise SigningError(_NO_LIBRARY) from error
        keys = []
        for path in paths:
            try:
                key = serialization.load_pem_public_key(path.read_bytes())
            except (OSError, ValueError) as error:
                raise SigningError(f"{path} is not a PEM public key: {error}") from error
            if not isinstance(key, ed25519.Ed25519PublicKey):
                raise SigningError(f"{path} is not an Ed25519 public key")
            keys.append(key)
        return cls(keys)

    def check(self, ref: str, digest: str, signature: str | None) -> None:
        """Raise SigningError unless one of these keys signed the version."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - `read` has imported the library

        if signature is None:
            raise SigningError(f"{ref} is not signed; publish it with --sign KEY")
        try:
            content = base64.b64decode(signature, validate=True)
        except (binascii.Error, ValueError) as error:
            raise SigningError(f"{ref}: its signature is not base64") from error
        for key in self._keys:
            try:
                key.verify(content, _message(ref, digest))
            except InvalidSignature:
                continue
            return
        raise SigningError(f"no trusted publisher (trusted_keys) signed {ref}")


def _message(ref: str, digest: str) -> bytes:
    """Return the text to sign. It holds name and version, so that a signature is valid for one version only."""
    return f"pinrank bundle 1\n{ref}\n{digest}\n".encode()
