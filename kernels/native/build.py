"""Compiles the native libraries: `python -m kernels.native.build`.

The installation of pinrank does this (`hatch_build.py`). It needs only a C++20 compiler: `$CXX`, or g++ from GCC 12 on.
The library of the native edge stands alone, because it also needs nghttp2 (Debian: libnghttp2-dev).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE / "libpinrank.so"
HTTP2_LIBRARY = HERE / "libpinrank_http2.so"

_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes"),
    # No reordering of floating-point operations.
    *("-fno-math-errno", "-fno-trapping-math"),
)
#: Allow contraction to fused multiply-adds, or, where the NumPy reference must be equalled to the bit, forbid it.
_FUSED, _EXACT = "-ffp-contract=fast", "-ffp-contract=off"
#: Compiler flags of each instruction set. At load time, the widest one that the processor supports is chosen.
_ISAS: dict[str, tuple[str, ...]] = {"portable": ()}
if platform.machine() in ("x86_64", "AMD64"):
    _ISAS |= {
        "avx2": ("-mavx2", "-mfma"),
        "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    }
#: Those with products of bf16 numbers, which the portable one computes in steps.
_BF16_ISAS = {"portable": ()} | {
    f"{isa}_bf16": (*flags, "-mavx512bw", "-mavx512bf16") for isa, flags in _ISAS.items() if isa == "avx512"
}
#: Files that are compiled once per instruction set, and the others.
_PER_ISA = {"encoder.cpp": _ISAS, "peak.cpp": _ISAS, "encoder_bf16.cpp": _BF16_ISAS}
_ONCE = (
    *("answer.cpp", "assembly.cpp", "dispatch.cpp", "distinct.cpp", "fetch.cpp", "gather.cpp", "near_cache.cpp"),
    *("propensities.cpp", "similarities.cpp", "values.cpp", "wire.cpp"),
)


class CompilerMissingError(Exception):
    """No C++ compiler was found."""


class Nghttp2MissingError(Exception):
    """The headers of nghttp2, an HTTP/2 library, were not found."""


def sources_digest() -> str:
    """Return the SHA-256 digest of all C++ sources, by which a library that was built from other ones is recognised."""
    digest = hashlib.sha256()
    for path in sorted((*HERE.glob("*.cpp"), *HERE.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(made: Path = LIBRARY, sanitizers: Sequence[str] = ()) -> Path:
    """Compile the library and return its path. One that this compiler has made of the same sources and flags is kept.

    Args:
        made: where the library goes.
        sanitizers: sanitizers of the compiler to build in, for tests: `address`, `undefined`, `thread`.

    Raises:
        CompilerMissingError: neither `$CXX` nor g++ is installed.
        subprocess.CalledProcessError: the compiler failed; its messages are on standard error.
    """
    units = [
        (source, isa, (f"-DPINRANK_ISA={isa}", _FUSED, *flags))
        for source, isas in _PER_ISA.items()
        for isa, flags in isas.items()
    ]
    units += [(source, "once", (_EXACT,)) for source in _ONCE]
    return _build(made, sanitizers, units, b"")


def build_http2(made: Path = HTTP2_LIBRARY, sanitizers: Sequence[str] = ()) -> Path:
    """Compile the library of the native edge, as `build` does, and return its path.

    Raises:
        Nghttp2MissingError: the headers of nghttp2 are not installed.
    """
    preprocess = [_compiler(), "-E", "-x", "c++", "-"]
    asked = subprocess.run(preprocess, input=b"#include <nghttp2/nghttp2.h>", capture_output=True, check=False)  # noqa: S603 - fixed arguments
    if asked.returncode:
        raise Nghttp2MissingError("the headers of nghttp2 are not installed (Debian and Ubuntu: libnghttp2-dev)")
    return _build(made, sanitizers, [("http2.cpp", "once", ())], asked.stdout, "-lnghttp2")


def _compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CompilerMissingError("no C++ compiler found: install g++, or set CXX to a compiler")
    return compiler


def _build(
    made: Path, sanitizers: Sequence[str], units: Sequence[tuple[str, str, Sequence[str]]], headers: bytes, *linked: str
) -> Path:
    """Compile units (source, name of the variant, flags) side by side, and link them with further libraries.

    `headers` is what the preprocessor makes of the system headers that the units read and that can change.
    """
    compiler = _compiler()
    # A sanitized encoder takes a minute to compile at -O3, and a tenth of that at -O1.
    watched = [f"-fsanitize={','.join(sanitizers)}", "-O1", "-g1", "-fno-sanitize-recover=all"] if sanitizers else []
    built_from = f'-DPINRANK_SOURCES="{sources_digest()}"'
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout  # noqa: S603 - fixed arguments
    steps = Path(__file__).read_bytes()
    inputs = (steps, compiler, version, platform.machine(), _FLAGS, watched, built_from, units, headers, linked)
    # Each `pip install` of the repository builds it, and most have nothing new to compile.
    mark = f"pinrank-build:{hashlib.sha256(repr(inputs).encode()).hexdigest()}"
    if made.is_file() and mark.encode() in made.read_bytes():
        return made
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder) / f"{source}.{variant}.o") for source, variant, _ in units]
        commands = [
            [compiler, *_FLAGS, *watched, built_from, *flags, "-c", str(HERE / source), "-o", object_file]
            for (source, _, flags), object_file in zip(units, objects, strict=True)
        ]
        marked = Path(folder) / "mark.cpp"
        marked.write_text(f'extern "C" __attribute__((visibility("default"))) const char pinrank_build[] = "{mark}";\n')
        objects.append(f"{marked}.o")
        commands.append([compiler, "-fPIC", "-c", str(marked), "-o", objects[-1]])
        running = [subprocess.Popen(command) for command in commands]  # noqa: S603 - fixed arguments
        for process, command in zip(running, commands, strict=True):
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, command)
        whole = Path(folder) / made.name
        subprocess.run([compiler, "-shared", *watched, "-o", str(whole), *objects, *linked], check=True)  # noqa: S603 - fixed arguments
        # A running server keeps the old file open, and the new file appears atomically.
        fresh = made.with_suffix(".new")
        shutil.copyfile(whole, fresh)
        fresh.replace(made)
    return made


def main() -> None:
    print(build())  # noqa: T201 - the output of a command
    try:
        print(build_http2())  # noqa: T201
    except Nghttp2MissingError as error:
        print(f"{HTTP2_LIBRARY.name} is not built, grpcio will serve instead of the native edge: {error}")  # noqa: T201


if __name__ == "__main__":
    main()
