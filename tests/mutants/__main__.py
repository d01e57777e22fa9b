"""Plant small faults in the pure files, one at a time, and run each file's tests: `make mutants`.

Existing tools do not fit: mutmut 3 plants no faults outside functions, where most of the constants are, and cosmic-ray
starts a Python process for each fault and edits the working tree. This tool forks a process for each fault, which
imports the file with the fault from memory and runs the file's tests until one fails. It changes no files.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import random
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

import pytest

from tests.mutants.mutate import Mutant, mutants

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
#: Fraction of the faults that the tests must notice; `unnoticed.toml` explains the others.
NOTICED_MIN = 0.95
#: Packages to import once, before the forks. Each fork imports pinrank's own modules itself, with the fault.
_IMPORTED = (
    "numexpr",
    "numpy",
    "grpc",
    "google.protobuf.message",
    "hypothesis",
    "onnx",
    "pydantic",
    "redis",
    "structlog",
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A file and the tests that must notice its faults, with the fastest first."""

    path: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")


@dataclass(frozen=True, slots=True)
class Fault:
    subject: Subject
    mutant: Mutant

    @property
    def key(self) -> str:
        return f"{self.subject.path} {self.mutant.name}"


class _WithFault(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a string instead of its file."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self._module, self._path, self._source = module, path, source

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._module:
            return None
        return importlib.machinery.ModuleSpec(name, self, origin=str(self._path))

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(self._path)
        code: CodeType = compile(self._source, str(self._path), "exec", dont_inherit=True)
        exec(code, module.__dict__)


def _subjects() -> list[Subject]:
    table = tomllib.loads((HERE / "subjects.toml").read_text())
    return [Subject(path, tuple(tests)) for path, tests in table.items()]


def _explained() -> dict[str, str]:
    """Return why unnoticed faults change nothing, by file and name."""
    table = tomllib.loads((HERE / "unnoticed.toml").read_text())
    return {f"{path} {name}": why for path, reasons in table.items() for name, why in reasons.items()}


def _run(subject: Subject, source: str, limit_s: float, *, quiet: bool = True) -> int:
    """Fork a process that runs the tests with a changed source; return its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    signal.alarm(max(1, round(limit_s)))
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    sys.meta_path.insert(0, _WithFault(subject.module, ROOT / subject.path, source))
    options = [
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "--assert=plain",
        "--hypothesis-seed=0",
    ]
    status: int = pytest.ExitCode.INTERNAL_ERROR
    try:
        status = pytest.main([*options, *subject.tests])
    finally:
        sys.stdout.flush()
        os._exit(status)  # the child must not continue with the parent's work


def _seconds_unharmed(subject: Subject) -> float:
    """Run a file's tests without a fault; return their seconds. Raises SystemExit if they fail."""
    start_s = time.monotonic()
    pid = _run(subject, (ROOT / subject.path).read_text(), 300, quiet=False)
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"{subject.path}: the tests fail without a fault; fix them first: {' '.join(subject.tests)}")
    return time.monotonic() - start_s


def _noticed(faults: Iterable[Fault], seconds: dict[str, float], workers: int) -> Iterator[tuple[Fault, bool]]:
    """Yield each fault and whether the tests noticed it: they failed, or took five times as long as usual."""
    waiting, running = list(faults), dict[int, Fault]()
    waiting.reverse()
    while waiting or running:
        while waiting and len(running) < workers:
            fault = waiting.pop()
            running[_run(fault.subject, fault.mutant.source, 10 + 5 * seconds[fault.subject.path])] = fault
        pid, status = os.wait()
        fault = running.pop(pid)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) > pytest.ExitCode.INTERNAL_ERROR:
            raise SystemExit(f"{fault.key}: pytest could not run ({pytest.ExitCode(os.WEXITSTATUS(status)).name})")
        yield fault, status != 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("paths", nargs="*", help="files to test; default: all files of subjects.toml")
    parser.add_argument(
        "--most", type=int, default=40, help="largest number of faults per file, drawn at random (0: all)"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed of the sample")
    parser.add_argument("--matching", default="", help="only faults whose name contains this text")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="parallel processes")
    options = parser.parse_args()
    os.chdir(ROOT)
    for name in _IMPORTED:
        importlib.import_module(name)
    explained, start_s = _explained(), time.monotonic()
    subjects = [one for one in _subjects() if not options.paths or one.path in options.paths]
    faults, possible, seconds = list[Fault](), Counter[str](), dict[str, float]()
    for subject in subjects:
        every = [
            Fault(subject, one) for one in mutants((ROOT / subject.path).read_text()) if options.matching in one.name
        ]
        possible[subject.path] = len(every)
        if 0 < options.most < len(every):
            chosen = random.Random(options.seed).sample(range(len(every)), options.most)
            every = [every[place] for place in sorted(chosen)]
        faults += every
        seconds[subject.path] = _seconds_unharmed(subject)
        print(f"{subject.path}: {len(every)} of {possible[subject.path]} faults, {seconds[subject.path]:.1f} s a run")
    noticed, unexplained, equivalent = Counter[str](), list[Fault](), Counter[str]()
    for fault, seen in _noticed(faults, seconds, options.workers):
        path = fault.subject.path
        noticed[path] += seen
        if not seen and fault.key in explained:
            equivalent[path] += 1
        elif not seen:
            unexplained.append(fault)
            print(f"not noticed: {path}:{fault.mutant.line} {fault.mutant.name}", flush=True)
    planted = Counter(fault.subject.path for fault in faults)
    part = noticed.total() / max(1, planted.total())
    print(
        f"{noticed.total()} of {planted.total()} faults noticed ({part:.1%}), {equivalent.total()} change nothing, "
        f"{len(unexplained)} unexplained; {time.monotonic() - start_s:.0f} s"
    )
    if not (options.paths or options.matching):
        rows = {
            path: {"possible": possible[path], "planted": planted[path], "noticed": noticed[path]} for path in planted
        }
        result = {"seed": options.seed, "most": options.most, "noticed": round(part, 4), "files": rows}
        RESULTS.write_text(json.dumps(result).replace('}, "', '},\n"') + "\n")
    if unexplained or part < NOTICED_MIN:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
