"""Plans in a bundle, by the real builder of TensorRT for RTX."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kernels.engine import EngineError
from kernels.gpu.tensorrt_build import Settings, load_library, plan_name
from model_store.bundle.files import BundleError, read_bundle
from model_store.bundle.plans import add_plans
from model_store.registry.store import open_model_store
from server.cli.main import app
from tests import tiny

RTX = Settings("tensorrt_rtx")


def version():
    return str(load_library("tensorrt_rtx").__version__)


@pytest.fixture
def folder(tmp_path):
    tiny.write_tiny_bundle(tmp_path / "bundle", 1)
    return tmp_path / "bundle"


def test_plans_are_built_for_each_architecture_and_are_part_of_the_bundle(folder, tmp_path):
    before = read_bundle(folder)
    told = []
    names = add_plans(folder, RTX, version(), ["8.9", "12.0"], lambda *built: told.append(built))
    after = read_bundle(folder)
    assert names == [plan_name("tensorrt_rtx", version(), sm, "bfloat16") for sm in ("sm_89", "sm_120")]
    assert told == [(name, len(after.files[name])) for name in names]
    assert set(after.files) == {*before.files, *names}
    assert after.digest != before.digest
    store = open_model_store(tmp_path / "models")
    store.publish(folder)
    assert store.read("tiny", 1).files == after.files


def test_a_build_that_fails_leaves_the_bundle_as_it_was(folder):
    before = read_bundle(folder)
    with pytest.raises(EngineError, match="cannot build for 9.9"):
        add_plans(folder, RTX, version(), ["8.9", "9.9"], lambda *_: None)
    assert read_bundle(folder) == before
    assert not (folder / "plans").exists()


def test_a_folder_of_plans_that_is_a_link_is_refused(folder, tmp_path):
    add_plans(folder, RTX, version(), ["8.9"], lambda *_: None)
    (folder / "plans").rename(tmp_path / "elsewhere")
    (folder / "plans").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="plans is a link; a bundle must not contain links"):
        read_bundle(folder)


def test_the_command_tells_what_it_built_and_what_it_needs(folder):
    built = CliRunner().invoke(app, ["model", "compile", str(folder), "--architecture", "8.9"])
    assert built.exit_code == 0, built.output
    assert f"{plan_name('tensorrt_rtx', version(), 'sm_89', 'bfloat16')}: " in built.output
    without = CliRunner().invoke(app, ["model", "compile", str(folder)])
    assert without.exit_code == 1
    assert "pass --architecture for each GPU to build for" in without.output
    lacking = CliRunner().invoke(app, ["model", "compile", str(folder), "--library", "tensorrt"])
    assert lacking.exit_code == 1
    assert "tensorrt is not installed; pip install 'pinrank[gpu]'" in lacking.output
