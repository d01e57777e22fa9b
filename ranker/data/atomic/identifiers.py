"""Identifiers of users and pins: their 64-bit ids, and spellings that are probably mistakes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from ranker.errors import DatasetError

_DIGITS_MAX = 19  # every unsigned integer of 19 digits fits 64 bits

#: Texts that data frames and databases write for a missing value; as real identifiers they are improbable.
MISSING = frozenset({"nan", "none", "null", "na", "n/a", "<na>", "nil", "nat", "\\n", "-", "undefined"})

_WHOLE_AS_DECIMAL = re.compile(r"[+-]?([0-9]+)\.0*")
_SHORTENED = re.compile(r"[+-]?[0-9]+\.[0-9]*[eE][+-]?[0-9]+")
_GROUPED = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")


def token_id(token: str) -> int:
    """Return the 64-bit id of a token: its number if it is one, else the low 63 bits of its 8-byte BLAKE2b hash."""
    if token.isascii() and token.isdigit() and len(token) <= _DIGITS_MAX:
        return int(token)
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "big") & ((1 << 63) - 1)


def distinct_ids(tokens: Sequence[str], what: str) -> np.ndarray:
    """Return uint64[N], the ids of N distinct tokens. Raises DatasetError if two of them share an id."""
    ids = np.array([token_id(token) for token in tokens], np.uint64)
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(same):
        first, second = (tokens[int(i)] for i in order[same[0] : same[0] + 2])
        raise DatasetError(f"{what} identifiers {first!r} and {second!r} have the same id; rename one of them")
    return ids


def misspelt(token: str) -> str | None:
    """Describe the mistake in an identifier and its fix; None if there is none.

    A number that a spreadsheet or a data frame has reformatted would be hashed as a word, and requests with the
    original number would not find it.
    """
    if not token.strip():
        return "is empty; remove the line, or fill in the identifier"
    if token != token.strip():
        return "starts or ends with a blank; remove it"
    if whole := _WHOLE_AS_DECIMAL.fullmatch(token):
        return f"is a whole number written as a decimal; write {whole[1]}"
    if _SHORTENED.fullmatch(token):
        return "is a number that a spreadsheet has shortened; write all of its digits"
    if _GROUPED.fullmatch(token):
        return f"has thousands separators; write {token.replace(',', '')}"
    return None
