from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from kernels.engine import LOGITS
from kernels.fusion import inlined, parse
from kernels.gpu.half import with_half_products
from tests import tiny
from tests.kernels.test_engines import batch


def run(model, given):
    feeds = {**given.request, **given.candidate, "row_request": given.row_request()}
    return ReferenceEvaluator(model).run([LOGITS], feeds)[0]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_products_are_in_half_precision_and_everything_else_as_it_was(half):
    plain = inlined(parse(tiny.network()))
    changed = with_half_products(plain, half)
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(changed).graph.value_info
    }
    products = [node for node in changed.graph.node if node.op_type in ("MatMul", "Gemm")]
    kind = TensorProto.BFLOAT16 if half == "bfloat16" else TensorProto.FLOAT16
    assert products
    assert all(kinds[node.output[0]] == kind for node in products)
    assert [value.SerializeToString() for value in changed.graph.input] == [
        value.SerializeToString() for value in plain.graph.input
    ]
    read = {name for node in changed.graph.node for name in node.input}
    assert {tensor.name for tensor in changed.graph.initializer} <= read, "weights are not kept twice"
    given = batch(5, 3)
    found, expected = run(changed, given), run(plain, given)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() <= 2e-2 * max(1, np.abs(expected).max())
