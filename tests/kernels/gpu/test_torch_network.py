"""What a CUDA graph asks of the network, on a device that has shapes and no numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.fusion import ENCODED, inlined, parse, take_out_encoder
from kernels.gpu.half import with_half_products
from kernels.gpu.torch_network import TorchNetwork
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


@pytest.mark.parametrize(("fusion", "form"), FORMS)
@pytest.mark.parametrize("fused", [False, True])
def test_nothing_comes_from_the_host_while_the_network_runs(fusion, form, fused):
    content, specs = exported(fusion, form)
    model, taken = parse(content), read_by(fusion, batch())[0]
    arrays = {**taken.request, **taken.candidate, "row_request": taken.row_request()}
    inputs = {name: torch.from_numpy(np.array(array)).to(DEVICE) for name, array in arrays.items()}
    call = take_out_encoder(model, specs) if fused else None
    if call is not None:
        model = parse(call.rest)
        inputs[ENCODED] = torch.empty((taken.rows, 960), device=DEVICE)
    network = TorchNetwork(with_half_products(inlined(model), "bfloat16"), DEVICE)
    with Crossings() as crossings:
        logits = network(inputs)
    assert (logits.shape, logits.device) == ((taken.rows, 3), DEVICE)
    assert crossings.found == []


def test_a_copy_would_show():
    with Crossings() as crossings:
        torch.ones(3).to(DEVICE)
    assert crossings.found
