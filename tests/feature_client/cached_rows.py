"""Near caches of the tiny pins and rows for them, with the native library and with NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from feature_client import cache_places
from feature_client.codec import Rows
from feature_client.near_cache import NearCache
from tests import tiny


@pytest.fixture(params=["native", "numpy"], autouse=True)
def implementation(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(cache_places, "library_if_built", lambda: None)


def ids(*values):
    return np.array(values, np.uint64)


def read(*pins):
    return Rows(tiny.pin_rows(ids(*pins)), np.zeros(len(pins), np.uint8))


def cache(kilobytes=64, stale_s=10.0):
    return NearCache(tiny.PINS, kilobytes << 10, stale_s)
