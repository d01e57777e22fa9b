"""Tests of the repository itself: generated code, imports, the wheel, and consoles."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
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


@pytest.mark.parametrize(
    "module", ["server.app", "server.cli.main", "ranker.data.features", "ranker.data.atomic.recbole", "loadtest.cli"]
)
def test_serving_and_the_demo_import_no_training_library(module):
    script = (
        f"import sys, {module}\n"
        "found = [m for m in ('torch', 'sklearn', 'onnxscript', 'matplotlib', 'tensorrt') if m in sys.modules]\n"
        "sys.exit(f'{found}' if found else 0)"
    )
    checked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert checked.returncode == 0, checked.stderr


def test_the_wheel_serves_without_the_repository_and_without_pytorch(tmp_path):
    """Build the wheel and run pinrank with only its content on the path."""
    from tests import tiny

    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("pinrank-*.whl"))) as wheel:
        wheel.extractall(site)
    for absent in ("torch", "sklearn", "onnxscript", "matplotlib", "pyarrow"):
        (site / f"{absent}.py").write_text(f"raise ModuleNotFoundError(name='{absent}')")
    tiny.write_tiny_bundle(tmp_path / "bundle")
    script = f"import server.cli.main; assert server.cli.main.__file__.startswith({str(site)!r}); server.cli.main.app()"

    def pinrank(*arguments):
        command = [sys.executable, "-c", script, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    verified = pinrank("model", "verify", str(tmp_path / "bundle"))
    assert "tiny@1 passes every check" in verified.stdout, verified.stderr
    refused = pinrank("train", "--utility", str(tmp_path / "bundle" / "utility.toml"), "--out", str(tmp_path / "new"))
    assert refused.returncode == 1
    assert "pip install 'pinrank[" in refused.stderr


def test_no_console_takes_brackets_in_a_message_for_markup():
    """Print titles, paths and `pip install 'pinrank[load]'` unchanged; use `Text` for styles."""
    calls = [
        (path, call.lineno, {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords})
        for folder in ("server", "ranker", "loadtest", "bench", "deploy")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Console"
    ]
    assert {path.relative_to(ROOT).parts[0] for path, *_ in calls} >= {"server", "ranker", "loadtest"}
    assert not [where for *where, given in calls if given.get("markup") is not False or given.get("emoji") is not False]
