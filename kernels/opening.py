from __future__ import annotations

from collections.abc import Callable

from kernels.engine import EngineFactory


def _numpy() -> EngineFactory:
    from kernels.numpy_engine import NumpyEngine  # noqa: PLC0415

    return NumpyEngine


def _openvino() -> EngineFactory:
    from kernels.openvino_engine import OpenVinoEngine  # noqa: PLC0415

    return OpenVinoEngine


#: Runtimes are imported when chosen: a CPU server loads no GPU library, and the other way round.
_FACTORIES: dict[str, Callable[[], EngineFactory]] = {"numpy": _numpy, "openvino": _openvino}

ENGINES = tuple(_FACTORIES)


def engine_factory(name: str) -> EngineFactory:
    """Return the factory of a runtime by name. Raises ValueError for an unknown one."""
    if name not in _FACTORIES:
        raise ValueError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")
    return _FACTORIES[name]()
