"""The native code under the compiler's sanitizers: no byte out of bounds, nothing undefined, no data race."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.native.build import Nghttp2MissingError, build, build_http2
from tests.kernels.native.sanitized import http2_library_beside

ROOT = Path(__file__).parents[3]
#: The tests that call native code. All of them run again with a library that was built with sanitizers.
TESTS = (
    "tests/feature_client/redis/test_answers.py",
    "tests/feature_client/test_cache_places.py",
    "tests/feature_client/test_codec.py",
    "tests/feature_client/values/test_distinct.py",
    "tests/feature_client/values/test_native_values.py",
    "tests/impressions/test_gathering.py",
    "tests/kernels/cpu/test_bf16.py",
    "tests/kernels/cpu/test_fused_encoder.py",
    "tests/model_store/exploration/test_native_propensities.py",
    "tests/model_store/model/test_assembly.py",
    "tests/model_store/model/test_logistic.py",
    "tests/model_store/model/test_native_utility.py",
    "tests/model_store/model/test_packed_fetch.py",
    "tests/model_store/model/test_similarities.py",
    "tests/server/api/test_native_parsing.py",
    "tests/server/edge/test_http2.py",
    "tests/server/edge/test_http2_limits.py",
    "tests/server/request/test_scoring.py",
)
_OPTIONS = {
    # Python itself frees little at its end. Its own allocator would hide overflows of small objects.
    "libasan.so": {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
    "libtsan.so": {"TSAN_OPTIONS": "halt_on_error=1"},
}


def runtime(name: str) -> str:
    """Return the path of a sanitizer's runtime library, or skip."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    asked = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} comes without {name}")
    return path


def sanitized(name: str, library: Path, *task: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.kernels.native.sanitized", str(library), *task]
    environment = os.environ | {"LD_PRELOAD": runtime(name)} | _OPTIONS[name]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def memory_checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runtime("libasan.so")
    checked = tmp_path_factory.mktemp("asan") / "checked.so"
    with contextlib.suppress(Nghttp2MissingError):  # the tests of the native edge are skipped then
        build_http2(http2_library_beside(checked), ("address", "undefined"))
    return build(checked, ("address", "undefined"))


@pytest.fixture(scope="module")
def thread_checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runtime("libtsan.so")
    checked = build(tmp_path_factory.mktemp("tsan") / "checked.so", ("thread",))
    tried = sanitized("libtsan.so", checked, "tests", "--version")
    if "unexpected memory mapping" in tried.stderr:
        pytest.skip("this kernel places memory where the thread sanitizer keeps its own (vm.mmap_rnd_bits above 28)")
    return checked


def test_the_native_code_stays_within_its_memory_and_its_language(memory_checked):
    done = sanitized("libasan.so", memory_checked, "tests", *TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_read_out_of_bounds_would_be_noticed(memory_checked):
    done = sanitized("libasan.so", memory_checked, "overflow")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_threads_share_encoders_and_assemblers_without_a_race(thread_checked):
    done = sanitized("libtsan.so", thread_checked, "threads")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_race_would_be_noticed(thread_checked):
    done = sanitized("libtsan.so", thread_checked, "race")
    assert done.returncode != 0
    assert "data race" in done.stderr
