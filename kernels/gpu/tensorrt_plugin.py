"""The fused kernel as a part of TensorRT's plans, which then need neither Triton nor Python to run.

TensorRT (10.7 and later) takes kernels that were compiled ahead of time, as plugins. TensorRT for RTX's Python API has
no such thing; there the encoder stays plain operators.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import GenericAlias, ModuleType
from typing import Any

from kernels.fusion import DOMAIN
from kernels.gpu.encoder_node import NODE
from kernels.gpu.tiles import TILES
from kernels.gpu.triton_ahead import arguments, compiled
from kernels.gpu.triton_encoder import TritonEncoder


def register(trt: ModuleType, encoder: TritonEncoder, architecture: str) -> None:
    """Make the kernel known to TensorRT in this process, compiled for an architecture such as `9.0`."""
    plugin, ahead = importlib.import_module(f"{trt.__name__}.plugin"), compiled(encoder, architecture)
    tensors = arguments()[:-1]
    # Values as types: the library says what its types are only when it is there.
    described: Any = plugin.TensorDesc

    def describe(*given: Any) -> Any:
        candidates = given[tensors.index("candidates")]
        return plugin.from_shape_expr((candidates.shape_expr[0], encoder.width), dtype=trt.float32)

    def launch(*given: Any) -> Any:
        params = plugin.KernelLaunchParams()
        params.grid_x = given[tensors.index(TILES)].shape_expr[0]
        params.block_x = ahead.threads
        params.shared_mem = ahead.shared_bytes
        return ahead.name, ahead.ptx, params, plugin.SymIntExprs(0)

    # TensorRT reads the plugin's schema off the functions' signatures.
    answer = GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs))
    plugin.register(f"{DOMAIN}::{NODE}")(_signed(describe, dict.fromkeys(tensors, described), described))
    more = {"outputs": GenericAlias(tuple, (described,)), "tactic": int}
    plugin.aot_impl(f"{DOMAIN}::{NODE}")(_signed(launch, {**dict.fromkeys(tensors, described), **more}, answer))


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returned: Any) -> Callable[..., Any]:
    """Give a function of any arguments a signature that names them."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(named, return_annotation=returned)  # type: ignore[attr-defined]
    return function
