"""The table of engines, which the settings, the command line, plans and the documents read.

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
    """An engine, before it is imported.

    Attributes:
        place: `module:name`; on a CPU of the engine's class, on a GPU of the function that opens its backend.
        on_gpu: whether it computes on GPUs.
        lowers_products: whether it can multiply numbers of fewer bits in the encoder (`kernels.engine.LowersProducts`).
        library: the library whose plans bundles may carry, if any; the names of plans begin with it.
        package: the pip requirement that brings its libraries; if None, an error names the missing library.
    """

    place: str
    _: KW_ONLY
    on_gpu: bool = False
    lowers_products: bool = False
    library: Library | None = None
    package: str | None = None


#: By name. A runtime is imported only when its engine is chosen, so a CPU server loads no GPU library, and vice versa.
ENGINES: Mapping[str, EngineRow] = {
    "numpy": EngineRow("kernels.cpu.numpy_engine:NumpyEngine"),
    "openvino": EngineRow("kernels.cpu.openvino_engine:OpenVinoEngine", lowers_products=True),
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
#: Those that can multiply numbers of fewer bits in the encoder.
LOWERS_PRODUCTS = tuple(name for name, row in ENGINES.items() if row.lowers_products)
#: Runs in flight on a GPU: while one computes, another's rows are copied in and a third's answers out.
_GPU_STREAMS = 3


def known_engine(name: str) -> str:
    """Return the name if it is an engine's. Raises ValueError, which lists the engines, if not."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return name


def default_streams(name: str, cores: int) -> int:
    """Return how many runs an engine should have in flight: one for each core, or what keeps one GPU busy."""
    return _GPU_STREAMS if ENGINES[name].on_gpu else cores


def bundled_plan(name: str, devices: Sequence[int] = (0,)) -> str | None:
    """Return the name under which a bundle carries this engine's plan for a GPU, None if the engine uses none.

    Raises:
        UnavailableError: the GPU or the engine's library is missing.
    """
    library = ENGINES[name].library
    if library is None:
        return None
    from kernels.gpu.tensorrt_backend import plan_here  # noqa: PLC0415

    return plan_here(library, devices[0])


def engine_factory(name: str, devices: Sequence[int] = (0,), products: str = "float32") -> EngineFactory:
    """Import an engine's runtime and return its factory. This touches no device, so a process may fork afterwards.

    Args:
        name: one of `ENGINES`.
        devices: the GPUs that the factory's engines compute on; (0,) for an engine of the processor.
        products: what the encoder's products may multiply: float32, or bf16 with one of `LOWERS_PRODUCTS`.

    Raises:
        ValueError: the runtime is unknown, not installed, or cannot be imported, or does not compute on such devices or
            with such products.
    """
    row = ENGINES[known_engine(name)]
    module, _, attribute = row.place.partition(":")
    try:
        made: Any = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = row.package or (error.name or "pinrank").partition(".")[0]
        raise ValueError(f"engine {name!r} lacks {error.name}; pip install {package}") from error
    except Exception as error:  # a library that was built for other libraries may raise anything
        raise ValueError(f"engine {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if products != "float32" and not row.lowers_products:
        raise ValueError(f"engine {name!r} takes no products of {products}; {', '.join(LOWERS_PRODUCTS)} does")
    if not row.on_gpu:
        if tuple(devices) != (0,):
            raise ValueError(f"engine {name!r} runs on the CPU and takes no devices, got {list(devices)}")
        factory: EngineFactory = partial(made, products=products) if row.lowers_products else made
        return factory
    if not devices or min(devices) < 0 or len(set(devices)) < len(devices):
        raise ValueError(f"devices must be ordinals of GPUs, each once, got {list(devices)}")
    from kernels.gpu.engine import GpuEngine  # noqa: PLC0415

    open_backend = partial(made, row.library) if row.library else made
    return partial(GpuEngine, open_backend, devices=tuple(devices))
