"""Compile the native encoder for every instruction set that may be met: `python -m kernels.cpu.native.build`.

Installing pinrank does this (`hatch_build.py`); nothing but a C++20 compiler is needed, `$CXX` or g++: GCC from 12 on.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "libpinrank_encoder.so"

_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes"),
    # Contraction to fused multiply-adds is wanted; nothing else may reorder or assume.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
#: What each instruction set adds; the widest that a processor has is chosen when the library is loaded.
_ISAS: dict[str, tuple[str, ...]] = {"portable": ()}
if platform.machine() in ("x86_64", "AMD64"):
    _ISAS |= {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    }


class CompilerMissingError(Exception):
    """There is no C++ compiler here."""


def build() -> Path:
    """Compile the library next to its sources and return its path.

    Raises:
        CompilerMissingError: neither `$CXX` nor g++ is a program.
        subprocess.CalledProcessError: the compiler refused; it has said why on standard error.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CompilerMissingError("no C++ compiler: install g++ or point CXX at one")
    with tempfile.TemporaryDirectory() as folder:
        units: list[tuple[str, str, tuple[str, ...]]] = [
            ("encoder.cpp", isa, (f"-DPINRANK_ISA={isa}", "-fvisibility=hidden", *f)) for isa, f in _ISAS.items()
        ]
        units.append(("dispatch.cpp", "dispatch", ()))
        objects = [str(Path(folder) / f"{name}.o") for _, name, _ in units]
        commands = [
            [compiler, *_FLAGS, *flags, "-c", str(HERE / source), "-o", made]
            for (source, _, flags), made in zip(units, objects, strict=True)
        ]
        running = [subprocess.Popen(command) for command in commands]  # noqa: S603 - fixed arguments
        for process, command in zip(running, commands, strict=True):
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, command)
        linked = Path(folder) / LIBRARY.name
        subprocess.run([compiler, "-shared", "-o", str(linked), *objects], check=True)  # noqa: S603 - fixed arguments
        # A server that runs has the old file open: it keeps it, and the new one appears whole.
        fresh = LIBRARY.with_suffix(".new")
        shutil.copyfile(linked, fresh)
        fresh.replace(LIBRARY)
    return LIBRARY


if __name__ == "__main__":
    print(build())  # noqa: T201 - a command's answer
