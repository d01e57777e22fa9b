"""Secrets out of texts: what a URL, a reply or an error may quote, and nobody should read in a log."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote, unquote, urlsplit

_HIDDEN = "***"
#: Shorter ones stand in ordinary words too.
_LENGTH_MIN = 6
#: Where a server begins to quote what it was sent, as Redis does with an unknown command; no apostrophe as in "can't".
_QUOTES = re.compile(r"""["`\x00-\x1f\x7f-\x9f]|(?<![A-Za-z])[bru]?'""")
_SAID_MAX = 200


def redacted(url: str) -> str:
    """Return a store's URL without user, password and options, for logs and messages; also one that is malformed."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _HIDDEN if "@" in url else url
    credentials, _, shown = rest.rpartition("@")
    if any(mark in credentials for mark in "?#"):  # where the password ends, only its author knows
        return f"{scheme}://{_HIDDEN}"
    for mark in "?#":
        shown = shown.partition(mark)[0]
    return f"{scheme}://{shown}"


def secrets_of(url: str, *, user: bool = False) -> frozenset[str]:
    """Return the passwords in a URL, in the forms in which an error may quote them, and if wanted the user's name."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return frozenset()
    options = (option.partition("=") for option in parts.query.split("&"))
    found = {
        parts.password,
        parts.username if user else None,
        *(value for name, _, value in options if name.endswith("password")),
    }
    given = {one for one in found if one}
    plain = {unquote(one) for one in given}
    return frozenset(given | plain | {quote(one, safe="") for one in plain})


def hidden(text: str, secrets: Iterable[str]) -> str:
    """Return a text with secrets of six or more characters made unreadable."""
    for secret in sorted((one for one in secrets if len(one) >= _LENGTH_MIN), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text


def said(error: Exception, secrets: Iterable[str]) -> str:
    """Return what a server's error says, up to where it quotes commands, which hold passwords, keys and rows."""
    text = hidden(_QUOTES.split(str(error), maxsplit=1)[0], secrets)[:_SAID_MAX].rstrip(" ([{:,")
    return text or type(error).__name__
