"""What is brought along to a machine with a GPU: enough, nothing twice, and not too much."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench.gpu import carried
from bench.gpu.carried import carried as carried_names
from bench.gpu.carried import lacking, machine_has, too_much, tree_bytes
from bench.gpu.phase import MEASURED_BY

ROOT = Path(__file__).parents[3]
OURS = ("bench", "feature_client", "impressions", "kernels", "loadtest", "model_store", "pinrank", "ranker", "server")
#: What code that the run reaches may import, and does not, as none of it is asked for.
NOT_ASKED_FOR = {
    "botocore": "a model store in a bucket",
    "obstore": "a model store in a bucket",
    "cryptography": "bundles that are signed",
    "pyjwt": "callers with JSON Web Tokens",
    "pyarrow": "an impression log",
}


def normal(name):
    return name.lower().replace("_", "-").replace(".", "-")


@cache
def file_of(module):
    for base in (ROOT, ROOT / "proto"):
        place = base.joinpath(*module.split("."))
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.exists():
                return file
    return None


def imported(file):
    """Return the modules that a file imports anywhere, also within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def others():
    """Return the modules of others that the run may import, with one of ours that does."""
    measured_by = {f"bench.gpu.{place.partition(':')[0]}" for place in MEASURED_BY.values()}
    # The engine is imported by a name in a table, the server in a process of its own.
    by_name = ["kernels.gpu.engine", "kernels.gpu.torch_backend", "server.cli.main"]
    waiting = [*measured_by, "bench.gpu.run", "bench.gpu.phase", "bench.gpu.measurements.launch", *by_name]
    seen, found = set(), {}
    while waiting:
        module = waiting.pop()
        file = file_of(module)
        if module in seen or file is None:
            continue
        seen.add(module)
        for name in imported(file):
            if name.partition(".")[0] in OURS:
                parts = name.split(".")
                waiting += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            elif name.partition(".")[0] not in sys.stdlib_module_names:
                found[name] = module
    assert len(seen) > 100
    return found


INSTALLED = cache(metadata.packages_distributions)


@cache
def packages_of(top, part):
    """Return the installed packages that `top.part` may be of: of a namespace, those that have this part of it."""
    found = {normal(name) for name in INSTALLED().get(top, ())}
    if top == "cuda":  # which no tests need
        return {"cuda-bindings"}
    if top != "google":
        return found or {top}
    return {name for name in found if any(str(file).startswith(f"{top}/{part}") for file in metadata.files(name) or ())}


def packages(module):
    top, _, rest = module.partition(".")
    return packages_of(top, rest.partition(".")[0])


def test_every_import_of_the_run_is_carried_or_there(others):
    there = {*carried_names(), *machine_has(), *NOT_ASKED_FOR}
    missing = {name: by for name, by in others.items() if not packages(name) & there}
    assert missing == {}


def test_what_is_not_asked_for_is_named_only_while_something_imports_it(others):
    assert {package for name in others for package in packages(name)} >= set(NOT_ASKED_FOR)


def test_whatever_a_carried_package_requires_is_carried_or_there():
    there = {*carried_names(), *machine_has()}
    environment = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    for name in carried_names():
        for text in metadata.requires(name) or ():
            required = Requirement(text)
            if required.marker is None or required.marker.evaluate(environment):
                assert normal(required.name) in there, f"{name} requires {text}"


def test_nothing_is_carried_that_nothing_needs(others):
    imported_ones = {package for name in others for package in packages(name)}
    required = {
        normal(Requirement(text).name) for name in carried_names() for text in metadata.requires(name) or ()
    }  # fmt: skip
    assert set(carried_names()) <= imported_ones | required


def test_every_carried_package_is_pinned_and_no_list_repeats_itself():
    pinned = {
        normal(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert set(carried_names()) <= pinned
    for names in (carried_names(), machine_has()):
        assert len(set(names)) == len(names)
    # Carried all the same: what is there is older than the generated code.
    assert set(carried_names()) & set(machine_has()) == set()


def test_more_than_can_be_carried_is_refused():
    assert too_much(40 << 20, 24 << 20) is None
    why = too_much(40 << 20, (24 << 20) + 1)
    assert why is not None
    assert why.startswith("the sources (40.0 MiB) and the wheels (24.0 MiB) are 64.0 MiB; the limit is 64 MiB")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows what the sources are")
def test_the_sources_leave_room_for_the_wheels():
    assert 1 << 20 < tree_bytes() < 32 << 20


def test_wheels_that_are_lacking_are_named(tmp_path, monkeypatch, capsys):
    *there, last = carried_names()
    for name in there:
        (tmp_path / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").touch()
    assert lacking(tmp_path) == [last]
    monkeypatch.setattr(carried, "WHEELS", tmp_path)
    assert carried.main() == 1
    assert f"lacks {last}: run `make gpu-wheels`" in capsys.readouterr().err


@pytest.mark.parametrize(("home", "elsewhere"), [("/nowhere", True), (".", False)])
def test_triton_compiles_elsewhere_where_there_is_no_home_to_write_to(tmp_path, home, elsewhere):
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "cache: ${TRITON_CACHE_DIR-}"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / home), "GPU_PYTHON": str(tmp_path / "python")}
    said = subprocess.check_output([ROOT / "bench" / "gpu-ten-minutes.sh"], env=environment, text=True)
    assert bool(re.search(r"^cache: /.+/triton$", said, re.MULTILINE)) is elsewhere


@pytest.mark.parametrize("script", ["gpu-ten-minutes.sh", "gpu-four-minutes.sh"])
def test_the_scripts_are_commands_and_their_syntax_is_right(script):
    file = ROOT / "bench" / script
    assert file.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
