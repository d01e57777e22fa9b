from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

from kernels.engine import EngineFactory


@dataclass(frozen=True, slots=True)
class _Runtime:
    """Where an engine is, as `module:name`: of the engine itself on a CPU, on a GPU of what opens its backend."""

    place: str
    _: KW_ONLY
    on_gpu: bool = False
    #: Whose plans travel in bundles.
    library: Literal["tensorrt", "tensorrt_rtx"] | None = None


#: Runtimes are imported when chosen: a CPU server loads no GPU library, and the other way round.
_RUNTIMES = {
    "numpy": _Runtime("kernels.cpu.numpy_engine:NumpyEngine"),
    "openvino": _Runtime("kernels.cpu.openvino_engine:OpenVinoEngine"),
    "tensorrt": _Runtime("kernels.gpu.tensorrt_backend:TensorRtBackend", on_gpu=True, library="tensorrt"),
    "tensorrt_rtx": _Runtime("kernels.gpu.tensorrt_backend:TensorRtBackend", on_gpu=True, library="tensorrt_rtx"),
    "torch": _Runtime("kernels.gpu.torch_backend:open_torch", on_gpu=True),
}

ENGINES = tuple(_RUNTIMES)
#: Those that compute on a GPU.
ON_GPU = frozenset(name for name, runtime in _RUNTIMES.items() if runtime.on_gpu)
#: Runs in flight on a GPU: while one computes, another's rows are copied in and a third's answers out.
_GPU_STREAMS = 3


def default_streams(name: str, cores: int) -> int:
    """Return how many runs an engine should have in flight: one a core, on each GPU what keeps it busy."""
    return _GPU_STREAMS if name in ON_GPU else cores


def bundled_plan(name: str, devices: Sequence[int] = (0,)) -> str | None:
    """Return what a plan for an engine on a GPU is called in a bundle, None for one that takes none from there.

    Raises:
        UnavailableError: there is no such GPU, or not the engine's library.
    """
    library = _RUNTIMES[name].library
    if library is None:
        return None
    from kernels.gpu.tensorrt_backend import plan_here  # noqa: PLC0415

    return plan_here(library, devices[0])


def engine_factory(name: str, devices: Sequence[int] = (0,)) -> EngineFactory:
    """Import a runtime by name and return its factory. No device is touched: a process may fork afterwards.

    Args:
        name: one of `ENGINES`.
        devices: the GPUs that the factory's engines compute on; (0,) for an engine of the processor.

    Raises:
        ValueError: the runtime is unknown, not installed, or cannot be imported, or does not compute on such devices.
    """
    if name not in _RUNTIMES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    runtime = _RUNTIMES[name]
    module, _, attribute = runtime.place.partition(":")
    try:
        made: Any = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = "'pinrank[gpu]'" if runtime.on_gpu else (error.name or "pinrank").partition(".")[0]
        raise ValueError(f"engine {name!r} lacks {error.name}; pip install {package}") from error
    except Exception as error:  # whatever a library raises that was built for others than those that are here
        raise ValueError(f"engine {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not runtime.on_gpu:
        if tuple(devices) != (0,):
            raise ValueError(f"engine {name!r} runs on the CPU and takes no devices, got {list(devices)}")
        factory: EngineFactory = made
        return factory
    if not devices or min(devices) < 0 or len(set(devices)) < len(devices):
        raise ValueError(f"devices must be ordinals of GPUs, each once, got {list(devices)}")
    from kernels.gpu.engine import GpuEngine  # noqa: PLC0415

    open_backend = partial(made, runtime.library) if runtime.library else made
    return partial(GpuEngine, open_backend, devices=tuple(devices))
