"""Removal of secrets from texts, such as URLs and error messages, before they are logged or shown."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import quote, unquote, urlsplit

_HIDDEN = "***"
#: Shorter secrets also occur inside ordinary words.
_LENGTH_MIN = 6


def redacted(url: str) -> str:
    """Return a store's URL, even a malformed one, without user, password and options, for logs and messages."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _HIDDEN if "@" in url else url
    credentials, _, shown = rest.rpartition("@")
    if any(mark in credentials for mark in "?#"):  # only its author knows where the password ends
        return f"{scheme}://{_HIDDEN}"
    for mark in "?#":
        shown = shown.partition(mark)[0]
    return f"{scheme}://{shown}"


def secrets_of(url: str) -> frozenset[str]:
    """Return the passwords in a URL, in every form in which an error message may quote them."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return frozenset()
    options = (option.partition("=") for option in parts.query.split("&"))
    found = {parts.password, *(value for name, _, value in options if name.endswith("password"))}
    given = {one for one in found if one}
    plain = {unquote(one) for one in given}
    return frozenset(given | plain | {quote(one, safe="") for one in plain})


def hidden(text: str, secrets: Iterable[str]) -> str:
    """Return a text in which secrets of six or more characters are masked."""
    for secret in sorted((one for one in secrets if len(one) >= _LENGTH_MIN), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text
