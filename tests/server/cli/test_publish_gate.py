"""`pinrank model publish` and what a bundle's lineage says about baselines."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from model_store.registry.store import open_model_store
from server.cli.main import app
from tests import tiny

SHORTFALL = (
    "save: HIT@3 by head 0.3330 against the 0.3840 of dot product, a difference of -0.0510 [-0.0700, -0.0320]",
    "hide: HIT@3 by head 0.2950 against the 0.3270 of LightGBM, a difference of -0.0320 [-0.0500, -0.0140]",
)


def publish(folder: Path, store: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["model", "publish", str(folder), "--store", str(store), *options])


@pytest.fixture
def behind(tmp_path: Path) -> Path:
    lineage = tiny.manifest_fields(1)["lineage"].model_copy(update={"shortfalls": SHORTFALL})
    tiny.write_tiny_bundle(tmp_path / "bundle", 1, lineage=lineage)
    return tmp_path / "bundle"


def test_a_bundle_that_is_behind_a_baseline_is_not_published(tmp_path: Path, behind: Path) -> None:
    refused = publish(behind, tmp_path / "models", "--label", "stable")
    assert refused.exit_code == 1
    said = " ".join(refused.output.split())
    assert "tiny@1 was not published, because it was not at least as good as its baselines" in said
    for sentence in SHORTFALL:
        assert sentence in said
    assert "use --force" in said
    assert not (tmp_path / "models").exists()


def test_force_publishes_it_with_the_same_lineage(tmp_path: Path, behind: Path) -> None:
    done = publish(behind, tmp_path / "models", "--label", "stable", "--force")
    assert done.exit_code == 0, done.output
    models = open_model_store(str(tmp_path / "models"))
    assert models.labels("tiny") == {"stable": 1}
    assert models.read("tiny", 1).manifest.lineage.shortfalls == SHORTFALL
