"""What must be true of the repository itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def generated(folder):
    files = [p for p in folder.rglob("*_pb2*") if p.suffix in {".py", ".pyi"}]
    assert files
    return {path.relative_to(folder): path.read_text() for path in files}


def test_generated_code_is_that_of_the_proto_files(tmp_path):
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto"), *outputs, *protos]
    subprocess.run(command, check=True, cwd=ROOT / "proto")
    assert generated(tmp_path) == generated(ROOT / "proto"), "run `make proto` and commit the result"


def test_imports_go_one_way():
    linter = Path(sys.executable).with_name("lint-imports")
    checked = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("module", ["server.app", "server.cli", "ranker.features", "ranker.atomic", "loadtest.cli"])
def test_serving_and_the_demo_import_no_training_library(module):
    script = (
        f"import sys, {module}\n"
        "found = [m for m in ('torch', 'sklearn', 'onnxscript', 'tensorrt') if m in sys.modules]\n"
        "sys.exit(f'{found}' if found else 0)"
    )
    checked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert checked.returncode == 0, checked.stderr


def test_operations_page_names_every_setting_and_metric():
    from server.config import ServerConfig, SurfaceConfig
    from server.metrics import Metrics

    page = (ROOT / "docs" / "operations.md").read_text()
    settings = {name for name in ServerConfig.model_fields if name != "surfaces"}
    settings |= {f"surfaces.NAME.{name}" for name in SurfaceConfig.model_fields}
    metrics = set()
    for family in Metrics().registry.collect():
        metrics.add(family.name + ("_total" if family.type == "counter" else ""))
    missing = {name for name in settings | metrics if f"`{name}`" not in page}
    assert not missing
