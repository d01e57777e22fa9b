"""Bearer tokens: how callers and servers read them from files, and how calls carry them."""

from __future__ import annotations

from pathlib import Path

#: Metadata of a call.
Metadata = tuple[tuple[str, str], ...]
#: Prefix of the `authorization` metadata value.
BEARER = b"Bearer "
#: Metadata in which a proxy names the caller whose call it passes on.
SPOKEN_FOR = "x-pinrank-caller"
#: Names of the metadata that say who calls.
CREDENTIALS = b"authorization", SPOKEN_FOR.encode()


class TokenFileError(ValueError):
    """A file does not hold a token that a call can carry; the message names the file and does not quote it."""


def token_in(content: bytes) -> bytes:
    """Return the token in a file's content; an empty file contains an empty token.

    Raises:
        ValueError: gRPC metadata cannot carry the content as a token. The message does not quote it.
    """
    token = content.strip()
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise ValueError("a token is one line of printable ASCII without spaces")
    return token


def authorization(path: Path | None) -> Metadata:
    """Return the metadata of calls with the token in a file; nothing without a file. Raises TokenFileError."""
    if path is None:
        return ()
    try:
        token = token_in(path.read_bytes())  # gRPC's own error would quote it
    except OSError as error:
        raise TokenFileError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise TokenFileError(f"{path} does not hold a valid token: {error}") from error
    if not token:
        raise TokenFileError(f"{path} does not hold a valid token: it is empty")
    return (("authorization", (BEARER + token).decode()),)
