"""Convert the matrix products of an ONNX network to half precision, as strongly typed runtimes require."""

from __future__ import annotations

from typing import Literal

import onnx
from onnx import TensorProto, helper, numpy_helper

from kernels.fusion import replace

Half = Literal["bfloat16", "float16"]

#: Largest error of a probability against float32: the effect of a few consecutive products with 8 significant bits.
HALF_TOLERANCE = 1e-2


def with_half_products(model: onnx.ModelProto, half: Half) -> onnx.ModelProto:
    """Return the network with the operands of every matrix product in half precision.

    Products take most of the time. Norms, softmaxes, sums and masks (-1e9 exceeds float16) stay in float32, and so do
    inputs and outputs. The runtime accumulates in float32. Weights are stored in half precision. Products inside
    functions are not converted; inline them first (`kernels.fusion.inlined`).
    """
    kind = TensorProto.DataType.Value(half.upper())
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    halves: dict[str, str] = {}
    weights: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def halved(name: str) -> str:
        if name and name not in halves:
            halves[name] = f"{name}.{half}"
            if name in floats:
                values = numpy_helper.to_array(floats[name]).astype(helper.tensor_dtype_to_np_dtype(kind))
                weights.append(numpy_helper.from_array(values, halves[name]))
            else:
                nodes.append(helper.make_node("Cast", [name], [halves[name]], to=kind))
        return halves.get(name, name)

    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and not node.domain:
            operands, (output,) = [halved(name) for name in node.input], node.output
            product = helper.make_node(node.op_type, operands, [f"{output}.product"], node.name)
            product.attribute.extend(node.attribute)
            nodes += [product, helper.make_node("Cast", [f"{output}.product"], [output], to=TensorProto.FLOAT)]
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input}
    replace(graph.node, nodes)
    replace(graph.initializer, [*(tensor for tensor in graph.initializer if tensor.name in read), *weights])
    onnx.checker.check_model(changed)
    return changed
