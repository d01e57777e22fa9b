"""Verifies JSON Web Tokens with the keys of a JWKS file. Needs the extra `jwt`."""

from __future__ import annotations

from typing import Any, NamedTuple

#: Signatures by a private key only: whoever reads the keys of this server must not be able to make tokens.
_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
_CLAIMS = ("exp", "sub", "iss", "aud")
#: Difference of clocks that is tolerated, in seconds.
_LEEWAY_S = 30


class JwtError(Exception):
    """A token is not valid; the message says why and does not quote it."""


class Verified(NamedTuple):
    """What a valid token says.

    Attributes:
        subject: who has it.
        expires_at: Unix time in seconds.
    """

    subject: str
    expires_at: float


class JwtVerifier:
    """Verifies tokens of one issuer."""

    def __init__(self, jwks: Any, issuer: str, audience: str) -> None:
        """Create a verifier.

        Args:
            jwks: a JSON Web Key Set, parsed (RFC 7517).
            issuer: what tokens must name as `iss`.
            audience: what tokens must name as `aud`.

        Raises:
            ValueError: there is no usable key, or PyJWT is not installed.
        """
        try:
            import jwt  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ValueError("JWTs need PyJWT: pip install 'pinrank[jwt]'") from error
        self._jwt, self._issuer, self._audience = jwt, issuer, audience
        try:
            keys = jwt.PyJWKSet.from_dict(jwks).keys
        except (jwt.PyJWTError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no key set, an object with `keys`: {error}") from error
        usable = [key for key in keys if key.algorithm_name in _ALGORITHMS]
        if not usable:
            raise ValueError(f"none of its keys is for one of {', '.join(sorted(_ALGORITHMS))}")
        self._keys: dict[str | None, Any] = {key.key_id: key for key in usable}

    def verified(self, token: str) -> Verified:
        """Verify a token. Raises JwtError."""
        try:
            key_id = self._jwt.get_unverified_header(token).get("kid")
            key = self._keys.get(key_id)
            if key is None:
                raise JwtError("its key is not in the key set")
            claims = self._jwt.decode(
                token, key.key, algorithms=[key.algorithm_name], audience=self._audience, issuer=self._issuer,
                leeway=_LEEWAY_S, options={"require": list(_CLAIMS)},
            )  # fmt: skip
        except self._jwt.PyJWTError as error:
            raise JwtError(str(error)) from error
        return Verified(str(claims["sub"]), float(claims["exp"]) + _LEEWAY_S)
