"""Data, and the vectors that an SVD makes of what is before a ranker's training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranker.commands import run
from tests.ranker.interactions import write_atomic


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atomic(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def vectors(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "v.parquet"
    code, output = run("embed", "svd", data, "--out", path, "--before", "training")
    assert code == 0, output
    return path
