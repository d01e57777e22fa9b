from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def config_file(model_store: Path, tmp_path: Path) -> Path:
    path = tmp_path / "pinrank.toml"
    path.write_text(
        f'model_store = "{model_store}"\nmodel = "tiny"\nlabels = ["stable", "canary"]\n'
        'feature_store = "memory://"\nengine_streams = 2\n'
    )
    return path
