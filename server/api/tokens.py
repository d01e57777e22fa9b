"""The token of ModelService calls: its form in a file, a server's or a caller's, and its comparison."""

from __future__ import annotations

import hashlib
import hmac

#: Of the value of `authorization`.
BEARER = b"Bearer "


def token_in(content: bytes) -> bytes:
    """Return the token that a file holds; an empty file holds an empty one.

    Raises:
        ValueError: no call could bring what it holds; the message does not quote it.
    """
    token = content.strip()
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise ValueError("a token is one line of printable ASCII without spaces")
    return token


class TokenDigest:
    """A token as its SHA-256: what compares tokens can show none."""

    def __init__(self, token: bytes) -> None:
        self._digest = hashlib.sha256(token).digest()

    def is_in(self, authorization: str | bytes) -> bool:
        """Tell whether a call's `authorization` brings it; the time that takes says nothing about it."""
        given = authorization.encode() if isinstance(authorization, str) else authorization
        bearer = given.startswith(BEARER)
        return hmac.compare_digest(hashlib.sha256(given[len(BEARER) :]).digest(), self._digest) and bearer
