"""Loads the C++ library. Everything works without it, through NumPy or OpenVINO, several times slower."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from kernels.native.build import HTTP2_LIBRARY, LIBRARY, sources_digest

_log = logging.getLogger(__name__)
_Library = TypeVar("_Library", bound=ctypes.CDLL)


class NativeLibraryError(Exception):
    """The library cannot be loaded. The message says why, and what to do."""


@cache
def library() -> ctypes.CDLL:
    """Load the library once. Its calls release the interpreter lock.

    Raises:
        NativeLibraryError: it was not built, or was built from other sources.
    """
    return _checked(ctypes.CDLL, LIBRARY, "reinstall pinrank with a C++ compiler present")


@cache
def http2_library() -> ctypes.PyDLL:
    """Load the library of the native edge once. Its calls, of microseconds, keep the interpreter lock.

    Raises:
        NativeLibraryError: it was not built, or was built from other sources, or nghttp2 is not installed.
    """
    return _checked(ctypes.PyDLL, HTTP2_LIBRARY, "install libnghttp2-dev and reinstall pinrank")


def _checked(kind: type[_Library], path: Path, remedy: str) -> _Library:
    try:
        loaded = kind(str(path))
        loaded.pinrank_sources.restype = ctypes.c_char_p
        built_from = loaded.pinrank_sources().decode()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path.name} cannot be loaded: {error}; {remedy}") from error
    if built_from != sources_digest():
        raise NativeLibraryError(f"{path.name} was built from other sources; run python -m kernels.native.build")
    return loaded


@cache
def library_if_built() -> ctypes.CDLL | None:
    """Load the library, or log a warning (once) and return None, for callers that have another way."""
    try:
        return library()
    except NativeLibraryError as error:
        _log.warning("%s", error)
        return None


_address_of, _byte_of = ctypes.addressof, ctypes.c_char.from_buffer


def address(array: np.ndarray) -> int:
    """Return the address of an array's first byte, as an argument of a call; the array must outlive it.

    Cost: 0.2 us for a contiguous array that can be written, 0.7 us if it is structured; `array.ctypes.data` costs 0.8.
    """
    try:
        return _address_of(_byte_of(array))  # type: ignore[arg-type]
    except (BufferError, TypeError, ValueError):  # it is read-only, has gaps, or is empty
        data: int = array.ctypes.data
        return data
