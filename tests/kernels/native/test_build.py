"""What the build of the native library compiles."""

from __future__ import annotations

import shutil

import pytest

from kernels.native import build as module
from kernels.native.build import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler is installed")


def test_a_library_is_compiled_again_only_if_something_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PER_ISA", {})
    monkeypatch.setattr(module, "_ONCE", ("dispatch.cpp",))
    made = tmp_path / "library.so"

    def compiled():
        before = made.stat().st_ino if made.exists() else None
        build(made)
        return made.stat().st_ino != before

    assert compiled()
    assert not compiled()
    monkeypatch.setattr(module, "_FLAGS", (*module._FLAGS, "-g1"))
    assert compiled()
    assert not compiled()
    monkeypatch.setattr(module, "sources_digest", lambda: "of other sources")
    assert compiled()
    assert not compiled()
    made.write_bytes(made.read_bytes()[:1000])
    assert compiled()
    other = tmp_path / "c++"
    other.symlink_to(shutil.which("g++"))
    monkeypatch.setenv("CXX", str(other))
    assert compiled()
