"""The network with the kernel's node: its numbers in ONNX's reference with the real kernel, and TensorRT's parser."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engine import LOGITS, EngineError
from kernels.fusion import DOMAIN, parse
from kernels.gpu import encoder_node
from kernels.gpu.encoder_node import NODE, register, with_kernel
from kernels.gpu.tensorrt_build import Settings, load_library, parsed, prepared
from kernels.gpu.tiles import TILES, tiles_of
from kernels.gpu.triton_ahead import CompiledKernel, arguments
from kernels.gpu.triton_encoder import encode_rows as kernel
from tests.ranker.exported import batch, exported, read_by

AHEAD = CompiledKernel("encode_rows", ".version 8.0", b"", 256, 65536)


@pytest.fixture(scope="module")
def network():
    content, specs = exported()
    return *with_kernel(parse(content), specs, "bfloat16"), specs


def node_of(encoder):
    """Return the node as ONNX's reference runs it: by the kernel, in Triton's interpreter."""

    class encode_rows(OpRun):  # noqa: N801 - the reference takes the node's name from it
        op_domain = DOMAIN

        def _run(self, *read, **_):
            given = [_tensor(array) for array in read]
            rows = len(read[arguments().index("candidates")])
            encoded = torch.zeros((rows, encoder.width))
            kernel[(len(read[0]),)](*given, encoded, **encoder.constants)
            return (encoded.numpy(),)

    return encode_rows


def _tensor(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("rows", [11, 40])
def test_the_network_with_the_kernel_ranks_as_without(network, rows):
    model, encoder, specs = network
    taken, _ = read_by("early", batch(rows=rows))
    feeds = {**taken.request, **taken.candidate, "row_request": taken.row_request(), TILES: tiles_of(taken.row_splits)}
    (found,) = ReferenceEvaluator(model, new_ops=[node_of(encoder)]).run([LOGITS], feeds)
    expected = NumpyEngine(exported()[0], specs, 3).run(taken)
    assert 0 < np.abs(found - expected).max() <= 1e-2 * max(1.0, np.abs(expected).max())


def test_the_node_asks_for_the_kernel_that_was_compiled_ahead(network):
    model, _, _ = network
    (node,) = [node for node in model.graph.node if node.op_type == NODE]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"plugin_namespace": b"pinrank", "plugin_version": b"1", "aot": 1}
    assert len(node.input) == len(arguments()) - 1
    assert not model.functions


class _Desc:
    def __init__(self, shape_expr=()):
        self.shape_expr = shape_expr


class Plugins:
    """What `tensorrt.plugin` would be told; it reads schemas off signatures, as the library does."""

    TensorDesc = _Desc

    class KernelLaunchParams(SimpleNamespace):
        pass

    class SymIntExprs(list[None]):
        def __init__(self, length):
            super().__init__([None] * length)

    def __init__(self):
        self.registered, self.launches = {}, {}

    def from_shape_expr(self, shape, dtype):
        return SimpleNamespace(shape=shape, dtype=dtype)

    def register(self, plugin_id):
        return lambda function: self.registered.setdefault(plugin_id, function)

    def aot_impl(self, plugin_id):
        return lambda function: self.launches.setdefault(plugin_id, function)


def test_tensorrt_is_told_the_kernels_arguments_its_output_and_its_launch(monkeypatch):
    plugins = Plugins()
    monkeypatch.setattr(encoder_node, "compiled", lambda *_: AHEAD)
    monkeypatch.setitem(sys.modules, "standing_in.plugin", plugins)
    trt = SimpleNamespace(__name__="standing_in", float32="float32")
    register(trt, SimpleNamespace(width=960), "9.0")
    describe, launch = plugins.registered["pinrank::encode_rows"], plugins.launches["pinrank::encode_rows"]
    schema = inspect.signature(describe)
    assert tuple(schema.parameters) == arguments()[:-1]
    assert {parameter.annotation for parameter in schema.parameters.values()} == {_Desc}
    assert schema.return_annotation is _Desc
    assert [*inspect.signature(launch).parameters][-2:] == ["outputs", "tactic"]
    given = {name: _Desc((f"{name} 0", 3)) for name in arguments()[:-1]}
    made = describe(*given.values())
    assert (made.shape, made.dtype) == (("candidates 0", 960), "float32")
    name, ptx, params, more = launch(*given.values(), (made,), None)
    assert (name, ptx, len(more)) == ("encode_rows", AHEAD.ptx, 0)
    assert vars(params) == {"grid_x": "tiles 0", "block_x": 256, "shared_mem": 65536}


def test_a_library_that_takes_kernels_is_given_the_node_and_the_kernel(monkeypatch):
    plugins, told = Plugins(), []
    monkeypatch.setattr(encoder_node, "compiled", lambda _, architecture: told.append(architecture) or AHEAD)
    monkeypatch.setitem(sys.modules, "standing_in.plugin", plugins)
    trt = SimpleNamespace(__name__="standing_in", IPluginV3QuickAOTBuild=object, float32="float32")
    content, specs = exported()
    model = onnx.load_model_from_string(prepared(trt, content, specs, Settings("tensorrt", architectures=("9.0",))))
    assert told == ["9.0"]
    assert plugins.launches
    assert [node.op_type for node in model.graph.node].count(NODE) == 1
    plain = prepared(trt, content, specs, Settings("tensorrt"))
    assert NODE not in {node.op_type for node in onnx.load_model_from_string(plain).graph.node}


def test_tensorrts_parser_takes_all_but_the_node_that_only_tensorrt_itself_has(network):
    """TensorRT for RTX parses node by node up to the plugin, which its Python API knows no way to make."""
    model, _, _ = network
    trt = load_library("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    with pytest.raises(EngineError, match="encode_rows") as refused:
        parsed(trt, trt.Builder(logger), model.SerializeToString(), logger)
    (node,) = [i for i, node in enumerate(model.graph.node) if node.op_type == NODE]
    assert f"In node {node} " in str(refused.value)
