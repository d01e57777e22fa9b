from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kernels.engine import EngineFactory


def _numpy() -> EngineFactory:
    from kernels.numpy_engine import NumpyEngine  # noqa: PLC0415

    return NumpyEngine


def _openvino() -> EngineFactory:
    from kernels.openvino_engine import OpenVinoEngine  # noqa: PLC0415

    return OpenVinoEngine


def _torch() -> EngineFactory:
    from kernels.gpu.torch_engine import TorchEngine  # noqa: PLC0415

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


def default_streams(name: str, cores: int, devices: int = 1) -> int:
    """Return how many runs an engine should have in flight: one a core, on GPUs what keeps each of them busy."""
    return _GPU_STREAMS * devices if name in ON_GPU else cores


def bundled_plan(name: str, device: int = 0) -> str | None:
    """Return what a plan for an engine on a GPU is called in a bundle, None for one that takes none from there.

    Raises:
        UnavailableError: there is no such GPU, or not the engine's library.
    """
    if name not in ("tensorrt", "tensorrt_rtx"):
        return None
    from kernels.gpu.tensorrt_engine import plan_here  # noqa: PLC0415

    return plan_here("tensorrt" if name == "tensorrt" else "tensorrt_rtx", device=device)


def engine_factory(name: str, devices: Sequence[int] = (0,)) -> EngineFactory:  # noqa: ARG001 - of GPU engines
    """Import a runtime by name and return its factory. No device is touched: a process may fork afterwards.

    Args:
        name: one of `ENGINES`.
        devices: the GPUs that the factory's engines compute on; none of a CPU engine's business.

    Raises:
        ValueError: the runtime is unknown, not installed, or cannot be imported.
    """
    if name not in _FACTORIES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    try:
        return _FACTORIES[name]()
    except ModuleNotFoundError as error:
        package = "'pinrank[gpu]'" if name in ON_GPU else error.name or "pinrank"
        raise ValueError(f"engine {name!r} lacks {error.name}; pip install {package}") from error
    except (ImportError, OSError, ValueError) as error:  # such as PyTorch without the libraries that it was built for
        raise ValueError(f"engine {name!r} cannot be imported: {error}") from error
