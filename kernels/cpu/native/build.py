"""Compile the native encoder for every supported instruction set: `python -m kernels.cpu.native.build`.

The installation of pinrank does this (`hatch_build.py`). It needs only a C++20 compiler: `$CXX`, or g++ from GCC 12 on.
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
    # Allow contraction to fused multiply-adds, but no reordering of floating-point operations.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
#: Compiler flags of each instruction set. At load time, the widest one that the processor supports is chosen.
_ISAS: dict[str, tuple[str, ...]] = {"portable": ()}
if platform.machine() in ("x86_64", "AMD64"):
    _ISAS |= {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    }


class CompilerMissingError(Exception):
    """No C++ compiler was found."""


def build() -> Path:
    """Compile the library next to its sources, and return its path.

    Raises:
        CompilerMissingError: neither `$CXX` nor g++ is installed.
        subprocess.CalledProcessError: the compiler failed; its messages are on standard error.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CompilerMissingError("no C++ compiler found: install g++, or set CXX to a compiler")
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
        # A running server keeps the old file open, and the new file appears atomically.
        fresh = LIBRARY.with_suffix(".new")
        shutil.copyfile(linked, fresh)
        fresh.replace(LIBRARY)
    return LIBRARY


if __name__ == "__main__":
    print(build())  # noqa: T201 - the output of a command
