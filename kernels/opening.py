from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kernels.engine import EngineFactory


def _numpy() -> EngineFactory:
    from kernels.numpy_engine import NumpyEngine  # noqa: PLC0415

    return NumpyEngine


def _openvino() -> EngineFactory:
    from kernels.openvino_engine import OpenVinoEngine  # noqa: PLC0415

    return OpenVinoEngine


def _torch() -> EngineFactory:
    try:
        from kernels.gpu.torch_engine import TorchEngine  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"engine 'torch' lacks {error.name}; pip install 'pinrank[gpu]'") from error
    return TorchEngine


def _tensorrt() -> EngineFactory:
    from kernels.gpu.tensorrt_engine import TensorRtEngine  # noqa: PLC0415

    return TensorRtEngine


def _tensorrt_rtx() -> EngineFactory:
    from kernels.gpu.tensorrt_engine import TensorRtEngine  # noqa: PLC0415

    return partial(TensorRtEngine, library="tensorrt_rtx")


#: Runtimes are imported when chosen: a CPU server loads no GPU library, and the other way round.
_FACTORIES: dict[str, Callable[[], EngineFactory]] = {
    "numpy": _numpy,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tensorrt_rtx": _tensorrt_rtx,
    "torch": _torch,
}

ENGINES = tuple(_FACTORIES)
#: Those that compute on a GPU.
ON_GPU = frozenset({"tensorrt", "tensorrt_rtx", "torch"})
#: Runs in flight on a GPU: while one computes, another's rows are copied in and a third's answers out.
_GPU_STREAMS = 3


def default_streams(name: str, cores: int) -> int:
    """Return how many runs an engine should have in flight: one a core, on a GPU what keeps it busy."""
    return _GPU_STREAMS if name in ON_GPU else cores


def bundled_plan(name: str) -> str | None:
    """Return what a plan for an engine on this machine is called in a bundle, None for one that takes none from there.

    Raises:
        EngineError: there is no GPU, or not the engine's library.
    """
    if name not in ("tensorrt", "tensorrt_rtx"):
        return None
    from kernels.gpu.tensorrt_engine import plan_here  # noqa: PLC0415

    return plan_here("tensorrt" if name == "tensorrt" else "tensorrt_rtx")


def engine_factory(name: str) -> EngineFactory:
    """Return the factory of a runtime by name. Raises ValueError for one that is unknown or not installed."""
    if name not in _FACTORIES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return _FACTORIES[name]()
