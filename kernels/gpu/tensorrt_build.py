"""From an ONNX network to a TensorRT plan, in a process of its own: a build may take minutes, or crash.

`python -m kernels.gpu.tensorrt_build` is that process; `build` starts it and hands it the network.
"""

from __future__ import annotations

import importlib
import logging
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, BinaryIO, Literal

import onnx
from pydantic import TypeAdapter

from kernels.engine import ROW_REQUEST, EngineError, TensorSpec
from kernels.fusion import inlined, parse
from kernels.gpu.half import Half, with_half_products
from kernels.gpu.tiles import TILES, tiles_max

_log = logging.getLogger(__name__)

Library = Literal["tensorrt", "tensorrt_rtx"]
"""TensorRT, and TensorRT for RTX: the same API, but builds ahead of time, without a GPU, for several architectures."""

_LENGTH = struct.Struct(">Q")
_BUILD_S = 1800.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a plan is built for.

    Attributes:
        library: that builds and runs it.
        half: of the operands of products.
        requests_max: largest number of requests in a run.
        rows_max: largest number of rows in a run.
        requests: that the plan is tuned for.
        rows: that the plan is tuned for.
        architectures: such as `8.9`, for TensorRT for RTX only; empty takes the library's own choice, and TensorRT
            always builds for the GPU that it finds.
        fused_for: architecture to compile the fused encoder kernel for, where the library takes kernels; empty leaves
            the encoder to the library.
    """

    library: Library
    half: Half = "bfloat16"
    requests_max: int = 64
    rows_max: int = 4096
    requests: int = 4
    rows: int = 512
    architectures: tuple[str, ...] = ()
    fused_for: str = ""


@dataclass(frozen=True, slots=True)
class Built:
    """A plan, and what building the next one may reuse (empty for a library that keeps nothing)."""

    plan: bytes
    timing_cache: bytes


def load_library(name: Library) -> ModuleType:
    """Import a library. Raises EngineError naming what to install."""
    found = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}[name]
    for module in found:
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise EngineError(f"{name} is not installed; pip install 'pinrank[{'gpu' if name == 'tensorrt' else 'rtx'}]'")


def plan_name(library: Library, version: str, architecture: str, half: Half) -> str:
    """Return a plan's name in a bundle: it runs on one version of one library and one architecture."""
    return f"plans/{library}_{version.replace('.', '_')}-{architecture}-{half}.plan"


def build(network: bytes, inputs: Sequence[TensorSpec], settings: Settings, timing_cache: bytes = b"") -> Built:
    """Build a plan in a process of its own.

    Raises:
        EngineError: why the builder refused, crashed or took longer than half an hour.
    """
    head = TypeAdapter(dict[str, Any]).dump_json({"settings": asdict(settings), "inputs": [asdict(i) for i in inputs]})
    given = b"".join(_LENGTH.pack(len(part)) + part for part in (head, network, timing_cache))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kernels.gpu.tensorrt_build"],
            input=given,
            capture_output=True,
            timeout=_BUILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{settings.library} did not build the network within {_BUILD_S:.0f} s") from error
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        raise EngineError(f"{settings.library} could not build the network ({ended}): {said[-2000:]}")
    if said:
        _log.warning("%s", said)
    plan, cache = _parts(done.stdout, 2)
    return Built(plan, cache)


def build_here(network: bytes, inputs: Sequence[TensorSpec], settings: Settings, timing_cache: bytes = b"") -> Built:
    """Build a plan in this process: what `build` runs elsewhere. Raises EngineError."""
    trt = load_library(settings.library)
    heard = Heard(trt)
    builder = trt.Builder(heard.logger)
    definition = parsed(trt, builder, prepared(trt, network, inputs, settings), heard)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile_of(builder, definition, inputs, settings))
    cache = None
    if settings.library == "tensorrt_rtx":
        if settings.architectures:
            _target(trt, config, settings.architectures)
    else:
        cache = config.create_timing_cache(timing_cache)
        config.set_timing_cache(cache, ignore_mismatch=True)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise EngineError(f"{settings.library} builds no plan: {heard.errors()}")
    return Built(bytes(plan), bytes(cache.serialize()) if cache is not None else b"")


def profile_of(builder: Any, definition: Any, inputs: Sequence[TensorSpec], settings: Settings) -> Any:
    """Return the shapes that a plan takes: every bucket of (requests, rows) up to the largest."""
    profile = builder.create_optimization_profile()
    sizes = {
        "request": (1, settings.requests, settings.requests_max),
        "candidate": (1, settings.rows, settings.rows_max),
    }
    ranges = {spec.name: [(size, *spec.shape) for size in sizes[spec.side]] for spec in inputs}
    ranges[ROW_REQUEST] = [(size,) for size in sizes["candidate"]]
    ranges[TILES] = [(tiles_max(r, n), 3) for r, n in zip(sizes["request"], sizes["candidate"], strict=True)]
    for i in range(definition.num_inputs):
        name = definition.get_input(i).name
        profile.set_shape(name, *ranges[name])
    return profile


def prepared(trt: ModuleType, network: bytes, inputs: Sequence[TensorSpec], settings: Settings) -> bytes:
    """Return the network as the library is given it: products in half precision, and the encoder as the kernel's node.

    Where a plan cannot carry the kernel the encoder is plain operators. The kernel is known to the library afterwards.
    """
    model = parse(network)
    wanted = settings.fused_for and settings.half == "bfloat16" and hasattr(trt, "IPluginV3QuickAOTBuild")
    if wanted:
        try:
            from kernels.gpu.encoder_node import with_kernel  # noqa: PLC0415 - needs PyTorch and Triton
            from kernels.gpu.tensorrt_plugin import register  # noqa: PLC0415
            from kernels.gpu.triton_ahead import compiled  # noqa: PLC0415
        except ImportError as error:
            print(f"the encoder is left to {settings.library}, as the kernel needs {error.name}", file=sys.stderr)  # noqa: T201
        else:
            answered = with_kernel(model, inputs, settings.half)
            if answered is not None:
                changed, encoder = answered
                plugin = importlib.import_module(f"{trt.__name__}.plugin")
                register(plugin, trt.float32, compiled(encoder, settings.fused_for), encoder.width)
                content: bytes = changed.SerializeToString()
                return content
    plain: bytes = with_half_products(inlined(model), settings.half).SerializeToString()
    return plain


def parsed(trt: ModuleType, builder: Any, content: bytes, heard: Heard) -> Any:
    """Return a network's definition, strongly typed. Raises EngineError with the parser's own words."""
    flags = 0
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if typed is not None:  # of TensorRT 10; later ones know nothing else
        flags = 1 << int(typed)
    definition = builder.create_network(flags)
    parser = trt.OnnxParser(definition, heard.logger)
    if not parser.parse(content):
        raise EngineError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)) or heard.errors())
    # The definition reads the parser's weights until it is built.
    return _Kept(definition, parser, content).definition


class _Kept:
    """Holds a parser for as long as its network lives."""

    _alive: list[object] = []  # noqa: RUF012 - a builder's process ends after one

    def __init__(self, definition: Any, *others: object) -> None:
        self.definition = definition
        self._alive.extend(others)


def _target(trt: ModuleType, config: Any, architectures: Sequence[str]) -> None:
    known = trt.ComputeCapability
    config.num_compute_capabilities = len(architectures)
    for i, name in enumerate(architectures):
        capability = getattr(known, f"SM{name.replace('.', '')}", None)
        if capability is None:
            has = sorted(member for member in known.__members__ if member.startswith("SM"))
            raise EngineError(f"TensorRT for RTX does not build for {name}; it knows {', '.join(has)}")
        config.set_compute_capability(capability, i)


class Heard:
    """A library's logger that keeps what went wrong."""

    def __init__(self, trt: ModuleType) -> None:
        lines: list[str] = []
        severities = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def log(self, severity: object, message: str) -> None:
                if severity in severities:
                    lines.append(message)

        self.logger = Logger()
        self._lines = lines

    def errors(self) -> str:
        return "; ".join(self._lines) or "it says nothing"


def _parts(content: bytes, count: int) -> list[bytes]:
    found, start = [], 0
    for _ in range(count):
        if len(content) < start + _LENGTH.size:
            raise EngineError("the builder's answer ends early")
        (length,) = _LENGTH.unpack_from(content, start)
        start += _LENGTH.size
        found.append(content[start : start + length])
        start += length
    return found


def _main(source: BinaryIO, sink: BinaryIO) -> int:
    head, network, cache = _parts(source.read(), 3)
    given = TypeAdapter(dict[str, Any]).validate_json(head)
    settings = TypeAdapter(Settings).validate_python(given["settings"])
    inputs = TypeAdapter(list[TensorSpec]).validate_python(given["inputs"])
    try:
        built = build_here(network, inputs, settings, cache)
    except (EngineError, onnx.checker.ValidationError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - what the parent reads
        return 1
    sink.writelines(_LENGTH.pack(len(part)) + part for part in (built.plan, built.timing_cache))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.stdin.buffer, sys.stdout.buffer))
