from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trees_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(trees_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fitted trees out of the cache of whoever runs the tests."""
    monkeypatch.setattr("ranker.baselines.score.default_cache_dir", lambda: trees_folder)
