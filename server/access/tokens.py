"""The token of who may manage models: reads it from a file, and compares it in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from pinrank.tokens import BEARER, token_in
from server.config import ConfigError


class TokenDigest:
    """The SHA-256 of a token: lets the server compare tokens without storing one, so that none can leak."""

    def __init__(self, token: bytes) -> None:
        self._digest = hashlib.sha256(token).digest()

    def is_in(self, authorization: str | bytes) -> bool:
        """Return whether a call's `authorization` value contains the token; takes the same time for any wrong token."""
        given = authorization.encode() if isinstance(authorization, str) else authorization
        bearer = given.startswith(BEARER)
        return hmac.compare_digest(hashlib.sha256(given[len(BEARER) :]).digest(), self._digest) and bearer


def read_token(path: Path | None) -> TokenDigest | None:
    """Read the token from a file; return None if the file is empty, or there is none.

    Raises:
        ConfigError: the file cannot be read, or its content is not a valid token.
    """
    if path is None:
        return None
    try:
        token = token_in(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"admin_token_file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"admin_token_file {path}: {error}") from error
    return TokenDigest(token) if token else None
