from __future__ import annotations

from pathlib import Path

import pytest

from model_store.bundle.files import read_bundle
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import ModelStore, open_model_store
from ranker.export.publishing import publish_bundle, what_is_left_to_do
from tests import tiny


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tiny.write_tiny_bundle(tmp_path / "bundle", 1)
    return tmp_path / "bundle"


def test_a_bundle_that_the_store_does_not_take_is_kept(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise ModelStoreError("the store is gone")

    models = open_model_store(tmp_path / "models")
    kept = tmp_path / f"tiny-1-{read_bundle(bundle).digest[:12]}"
    with monkeypatch.context() as patched:
        patched.setattr(ModelStore, "publish", gone)
        for _ in range(2):
            with pytest.raises(ModelStoreError) as caught:
                publish_bundle(bundle, models, "stable", keep_in=tmp_path)
        assert str(caught.value) == (
            f"the store is gone. The bundle is in {kept}; to publish it, run: pinrank model publish {kept} "
            f"--store {models.where} --label stable"
        )
        with pytest.raises(ModelStoreError, match=f"The bundle is in {bundle}; "):
            publish_bundle(bundle, models, None)
    assert read_bundle(kept).digest == read_bundle(bundle).digest
    publish_bundle(kept, models, "stable")
    assert models.labels("tiny") == {"stable": 1}


def test_what_servers_still_need_is_said(tmp_path: Path, bundle: Path) -> None:
    models = open_model_store(tmp_path / "models")
    publish_bundle(bundle, models, "canary")
    (line,) = what_is_left_to_do(models, read_bundle(bundle), "canary")
    assert 'set labels = ["canary"] in the server\'s settings, or run pinrank model label tiny stable 1 --store' in line
    models.set_label("tiny", "stable", 1)
    assert list(what_is_left_to_do(models, read_bundle(bundle), "canary")) == []
