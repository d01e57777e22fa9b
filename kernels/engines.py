"""The engines there are: the one table that settings, opening, plans and documents read.

A new engine is a file of its own and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads the table, and is to answer at once
    from kernels.engine import EngineFactory
    from kernels.gpu.tensorrt_build import Library


@dataclass(frozen=True, slots=True)
class EngineRow:
    """What is known of an engine before it is imported.

    Attributes:
        place: `module:name` of the engine itself on a CPU, of what opens its backend on a GPU.
        on_gpu: whether it computes on GPUs.
        library: whose plans travel in bundles, if any do; their names begin with it.
        package: what brings its libraries; without one, the library that is missing is named.
    """

    place: str
    _: KW_ONLY
    on_gpu: bool = False
    library: Library | None = None
    package: str | None = None


#: By name. Runtimes are imported when chosen: a CPU server loads no GPU library, and the other way round.
ENGINES: Mapping[str, EngineRow] = {
    "numpy": EngineRow("kernels.cpu.numpy_engine:NumpyEngine"),
    "openvino": EngineRow("kernels.cpu.openvino_engine:OpenVinoEngine"),
    "tensorrt": EngineRow(
        "kernels.gpu.tensorrt_backend:TensorRtBackend", on_gpu=True, library="tensorrt", package="'pinrank[gpu]'"
    ),
    "tensorrt_rtx": EngineRow(
        "kernels.gpu.tensorrt_backend:TensorRtBackend", on_gpu=True, library="tensorrt_rtx", package="'pinrank[rtx]'"
    ),
    "torch": EngineRow("kernels.gpu.torch_backend:open_torch", on_gpu=True, package="'pinrank[gpu]'"),
}

#: Those that compute on a GPU, and those whose plans travel in bundles.
ON_GPU = tuple(name for name, row in ENGINES.items() if row.on_gpu)
WITH_PLANS = tuple(name for name, row in ENGINES.items() if row.library)
#: Runs in flight on a GPU: while one computes, another's rows are copied in and a third's answers out.
_GPU_STREAMS = 3


def known_engine(name: str) -> str:
    """Return the name of an engine. Raises ValueError, which names those there are, for any other."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return name


def default_streams(name: str, cores: int) -> int:
    """Return how many runs an engine should have in flight: one a core, on each GPU what keeps it busy."""
    return _GPU_STREAMS if ENGINES[name].on_gpu else cores


def bundled_plan(name: str, devices: Sequence[int] = (0,)) -> str | None:
    """Return what a plan for an engine on a GPU is called in a bundle, None for one that takes none from there.

    Raises:
        UnavailableError: there is no such GPU, or not the engine's library.
    """
    library = ENGINES[name].library
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
    row = ENGINES[known_engine(name)]
    module, _, attribute = row.place.partition(":")
    try:
        made: Any = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = row.package or (error.name or "pinrank").partition(".")[0]
        raise ValueError(f"engine {name!r} lacks {error.name}; pip install {package}") from error
    except Exception as error:  # whatever a library raises that was built for others than those that are here
        raise ValueError(f"engine {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not row.on_gpu:
        if tuple(devices) != (0,):
            raise ValueError(f"engine {name!r} runs on the CPU and takes no devices, got {list(devices)}")
        factory: EngineFactory = made
        return factory
    if not devices or min(devices) < 0 or len(set(devices)) < len(devices):
        raise ValueError(f"devices must be ordinals of GPUs, each once, got {list(devices)}")
    from kernels.gpu.engine import GpuEngine  # noqa: PLC0415

    open_backend = partial(made, row.library) if row.library else made
    return partial(GpuEngine, open_backend, devices=tuple(devices))
