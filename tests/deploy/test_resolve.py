"""The check of the extras, against an index on loopback."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import tomllib
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.install import resolve

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def publish(root, name, version, *needs):
    """Put a wheel without content into an index."""
    folder = root / "simple" / name
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    links = [f'<a href="{file.name}">{file.name}</a>' for file in sorted(folder.glob("*.whl"))]
    (folder / "index.html").write_text("\n".join(["<!DOCTYPE html>", *links]))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index in which torchlike 2 needs tritonlike 3.7, of which there is 3.7 and 3.9."""
    publish(tmp_path, "torchlike", "2", "tritonlike==3.7")
    publish(tmp_path, "tritonlike", "3.7")
    publish(tmp_path, "tritonlike", "3.9")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("PIP_INDEX_URL", url)
    yield url
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("resolver", [resolve.with_uv, resolve.with_pip])
def test_a_pin_beside_which_another_version_is_asked_for_fails_whatever_lies_in_local_folders(
    index, resolver, tmp_path, monkeypatch
):
    local = tmp_path / "local"
    publish(local, "torchlike", "2+local")
    monkeypatch.setenv("PIP_FIND_LINKS", str(local / "simple" / "torchlike"))
    constraints = tmp_path / "constraints.txt"
    monkeypatch.setattr(resolve, "CONSTRAINTS", constraints)
    environment, found_index = resolve.clean_environment()
    assert found_index == index
    constraints.write_text("tritonlike==3.9\n")
    refused = resolver("train", ["torchlike==2"], PYTHON, environment, found_index, tmp_path)
    assert "tritonlike" in refused.failure
    constraints.write_text("tritonlike==3.7\n")
    good = resolver("train", ["torchlike==2"], PYTHON, environment, found_index, tmp_path)
    assert (good.packages, good.failure) == (2, "")


def test_without_the_index_nothing_passes():
    environment = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:1/simple", "UV_HTTP_RETRIES": "0"}
    checked = subprocess.run(
        [sys.executable, "-m", "deploy.install.resolve"], env=environment, cwd=resolve.ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 1
    assert "NOT CHECKED: the package index cannot be reached" in checked.stderr
    assert "resolves" not in checked.stdout


def test_every_extra_is_a_set_and_own_extras_are_expanded():
    project = tomllib.loads((resolve.ROOT / "pyproject.toml").read_text())["project"]
    found = dict(resolve.sets(project))
    assert set(found) == {"no extra", *project["optional-dependencies"], "all extras"}
    assert list(found)[-1] == "all extras"
    assert any(line.startswith("pyarrow") for line in found["train"]), "through pinrank[data]"
    assert not [line for lines in found.values() for line in lines if line.startswith("pinrank")]


def test_of_the_surroundings_only_the_way_to_the_index_is_kept(monkeypatch):
    for name, value in {
        "PIP_FIND_LINKS": "/some/wheels", "PIP_EXTRA_INDEX_URL": "http://other/simple", "PIP_CONSTRAINT": "c.txt",
        "UV_FIND_LINKS": "/some/wheels", "UV_INDEX": "http://other/simple",
        "PIP_INDEX_URL": "http://mirror/simple", "HTTPS_PROXY": "http://proxy:3128",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    environment, index = resolve.clean_environment()
    assert index == environment["PIP_INDEX_URL"] == "http://mirror/simple"
    assert environment["HTTPS_PROXY"] == "http://proxy:3128"
    assert "other" not in "".join(environment.values())
    assert not {"PIP_FIND_LINKS", "UV_FIND_LINKS", "PIP_CONSTRAINT"} & set(environment)
    assert environment["PIP_CONFIG_FILE"] == os.devnull
