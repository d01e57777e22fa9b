"""Build TensorRT plans from ONNX networks, in a separate process: a build can take minutes, or crash."""

from __future__ import annotations

import importlib
import logging
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import onnx

from kernels.engine import EngineError, TensorSpec, UnavailableError
from kernels.fusion import inlined, parse
from kernels.gpu.half import Half, with_half_products
from kernels.gpu.staging import Bucket, Buckets, Layout

_log = logging.getLogger(__name__)

Library = Literal["tensorrt", "tensorrt_rtx"]
"""TensorRT, or TensorRT for RTX, which has the same API but builds without a GPU, for several architectures."""

_BUILD_S = 1800.0
_TUNED_FOR = Bucket(requests=4, rows=512)
_BUILDER = "from kernels.gpu.tensorrt_build import builder; builder()"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a build: the library, the type of product operands, and compute capabilities such as `8.9`.

    TensorRT for RTX builds for all `architectures`, or for its own choice if there are none. TensorRT always builds for
    the GPU of this machine; with an architecture, it includes the Triton kernel, compiled for that architecture.
    """

    library: Library
    half: Half = "bfloat16"
    architectures: tuple[str, ...] = ()


class BuildResult(NamedTuple):
    """A plan, and the timing cache that speeds up the next build (empty if the library has none)."""

    plan: bytes
    timing_cache: bytes


def load_library(name: Library) -> ModuleType:
    """Import a library. Raises UnavailableError if it is missing; the message names the package to install."""
    for module in (name, f"{name}_bindings"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise UnavailableError(f"{name} is not installed; pip install 'pinrank[{'gpu' if name == 'tensorrt' else 'rtx'}]'")


def plan_name(library: Library, version: str, architecture: str, half: Half) -> str:
    """Return the file name of a plan in a bundle. A plan fits one version of one library and one architecture."""
    return f"plans/{library}_{version.replace('.', '_')}-{architecture}-{half}.plan"


def build(network: bytes, inputs: Sequence[TensorSpec], settings: Settings, timing_cache: bytes = b"") -> BuildResult:
    """Build a plan in a separate process. Raises EngineError if it fails, crashes or takes more than half an hour."""
    given = pickle.dumps((network, tuple(inputs), settings, timing_cache))
    try:
        done = subprocess.run(  # noqa: S603 - runs this module
            [sys.executable, "-c", _BUILDER], input=given, capture_output=True, timeout=_BUILD_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{settings.library} did not build the network within {_BUILD_S:.0f} s") from error
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        raise EngineError(f"{settings.library} could not build the network ({ended}): {said[-2000:]}")
    if said:
        _log.warning("%s", said)
    length, _, content = done.stdout.partition(b"\n")
    return BuildResult(content[: int(length)], content[int(length) :])


def builder() -> None:
    """The entry point of that process: read the arguments, and write the plan's length, the plan and the cache."""
    try:
        built = build_here(*pickle.load(sys.stdin.buffer))  # noqa: S301 - from the parent process
    except (EngineError, onnx.checker.ValidationError) as error:
        sys.exit(str(error))
    sys.stdout.buffer.writelines((b"%d\n" % len(built.plan), built.plan, built.timing_cache))


def build_here(
    network: bytes, inputs: Sequence[TensorSpec], settings: Settings, timing_cache: bytes = b""
) -> BuildResult:
    """Build a plan in this process. `build` runs this in another one. Raises EngineError."""
    trt = load_library(settings.library)
    logger = trt.Logger(trt.Logger.ERROR)  # to stderr, which `build` reads
    maker = trt.Builder(logger)
    # Until the build ends, the definition refers to the parser's weights, and the parser to `content`.
    content = prepared(trt, network, inputs, settings)
    definition, parser = parsed(trt, maker, content, logger)
    config = maker.create_builder_config()
    config.add_optimization_profile(profile_of(maker, definition, inputs))
    cache = None
    if settings.library == "tensorrt":
        cache = config.create_timing_cache(timing_cache)
        config.set_timing_cache(cache, ignore_mismatch=True)
    elif settings.architectures:
        _target(trt, config, settings.architectures)
    plan = maker.build_serialized_network(definition, config)
    del parser
    if plan is None:
        raise EngineError(f"{settings.library} returned no plan")
    return BuildResult(bytes(plan), bytes(cache.serialize()) if cache is not None else b"")


def profile_of(maker: Any, definition: Any, inputs: Sequence[TensorSpec]) -> Any:
    """Return the optimization profile of a plan: all shapes up to the largest bucket of (requests, rows)."""
    profile = maker.create_optimization_profile()
    layouts = [Layout(inputs, bucket, tiled=True) for bucket in (Bucket(1, 1), _TUNED_FOR, Buckets().all()[-1])]
    for i in range(definition.num_inputs):
        name = definition.get_input(i).name
        profile.set_shape(name, *(layout.places[name].shape for layout in layouts))
    return profile


def prepared(trt: ModuleType, network: bytes, inputs: Sequence[TensorSpec], settings: Settings) -> bytes:
    """Return the network for the library: with products in half precision, and the encoder as the kernel's node.

    The kernel is registered with the library. If a plan cannot contain it, the encoder consists of plain operators.
    """
    model, answered = parse(network), None
    if settings.architectures and settings.half == "bfloat16" and hasattr(trt, "IPluginV3QuickAOTBuild"):
        from kernels.gpu.encoder_node import register, with_kernel  # noqa: PLC0415 - needs PyTorch and Triton

        answered = with_kernel(model, inputs, settings.half)
    if answered is None:
        changed = with_half_products(inlined(model), settings.half)
    else:
        changed, encoder = answered
        register(trt, encoder, settings.architectures[0])
    content: bytes = changed.SerializeToString()
    return content


def parsed(trt: ModuleType, maker: Any, content: bytes, logger: Any) -> tuple[Any, Any]:
    """Return a network's strongly typed definition, and its parser. Raises EngineError with the parser's errors."""
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = maker.create_network(
        0 if typed is None else 1 << int(typed)
    )  # TensorRT 11 has no flag: it is always strongly typed
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(content):
        raise EngineError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    return definition, parser


def _target(trt: ModuleType, config: Any, architectures: Sequence[str]) -> None:
    known = {name: kind for name, kind in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    config.num_compute_capabilities = len(architectures)
    for i, name in enumerate(architectures):
        if f"SM{name.replace('.', '')}" not in known:
            raise EngineError(f"TensorRT for RTX cannot build for {name}; use one of {', '.join(sorted(known))}")
        config.set_compute_capability(known[f"SM{name.replace('.', '')}"], i)
