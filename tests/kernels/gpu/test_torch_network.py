"""What a CUDA graph asks of the network, on a device that has shapes and no numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.engine import EngineError
from kernels.fusion import inlined, parse
from kernels.gpu.encoder_node import NODE, with_kernel
from kernels.gpu.half import with_half_products
from kernels.gpu.tiles import TILES, tiles_of
from kernels.gpu.torch_network import TorchNetwork
from kernels.gpu.triton_ahead import arguments
from tests.ranker.exported import FORMS, batch, exported, read_by

DEVICE = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Notes the operations that copy between devices, or mix tensors of two."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        read = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in read if tensor.ndim}
        if isinstance(made, torch.Tensor) and read:
            devices.add(made.device.type)
        if len(devices) > 1:
            self.found.append(str(func))
        return made


def launched(*given):
    """Stand for the kernel, which reads nothing from the host."""
    assert {tensor.device for tensor in given} == {DEVICE}
    return torch.empty((len(given[arguments().index("candidates")]), 960), device=DEVICE)


@pytest.mark.parametrize(("fusion", "form"), FORMS)
@pytest.mark.parametrize("fused", [False, True])
def test_nothing_comes_from_the_host_while_the_network_runs(fusion, form, fused):
    content, specs = exported(fusion, form)
    model, taken = parse(content), read_by(fusion, batch())[0]
    arrays = {**taken.request, **taken.candidate, "row_request": taken.row_request()}
    inputs = {name: torch.from_numpy(np.array(array)).to(DEVICE) for name, array in arrays.items()}
    answered = with_kernel(model, specs, "bfloat16") if fused else None
    if answered is None:
        network = TorchNetwork(with_half_products(inlined(model), "bfloat16"), DEVICE)
    else:
        inputs[TILES] = torch.from_numpy(tiles_of(taken.row_splits)).to(DEVICE)
        network = TorchNetwork(answered[0], DEVICE, {NODE: launched})
    with Crossings() as crossings:
        logits = network(inputs)
    assert (logits.shape, logits.device) == ((taken.rows, 3), DEVICE)
    assert crossings.found == []


def test_a_copy_would_show():
    with Crossings() as crossings:
        torch.ones(3).to(DEVICE)
    assert crossings.found


def test_what_an_operator_is_not_known_to_take_is_refused_before_it_runs():
    model = parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        network (float[N, 2] given) => (float[N, 2] logits) { logits = Softmax <unheard_of = 1> (given) }""")
    with pytest.raises(EngineError, match="the PyTorch backend does not support Softmax with unheard_of"):
        TorchNetwork(model, DEVICE)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sizes = Shape <start = 1> (given)\n logits = Expand (given, sizes)", [[1, 4], [3, 2]]),
        ("m = ReduceMean <keepdims = 1> (given, last)\n logits = Sub (given, m)", [[-1.5, 1.5], [0.5, -0.5]]),
        ("m = ReduceMin <keepdims = 1> (given, last)\n n = Identity (m)\n logits = Max (n, given)", [[1, 4], [3, 2]]),
    ],
)
def test_operators_of_other_exporters_compute_what_onnx_says(body, expected):
    model = parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        network (float[N, 2] given) => (float[N, 2] logits) <int64[1] last = {{-1}}> {{ {body} }}""")
    given = np.array([[1, 4], [3, 2]], np.float32)
    (reference,) = ReferenceEvaluator(model).run(None, {"given": given})
    np.testing.assert_allclose(reference, expected)
    np.testing.assert_allclose(TorchNetwork(model, torch.device("cpu"))({"given": torch.from_numpy(given)}), expected)
