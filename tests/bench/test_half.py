from __future__ import annotations

import numpy as np

from bench.engines import half
from kernels.cpu.numpy_engine import NumpyEngine
from kernels.gpu.engine import GpuEngine
from tests import tiny
from tests.kernels.test_engines import SPECS, batch


def test_the_rounded_engine_computes_the_network_with_products_in_bf16():
    rounded = GpuEngine(half.open_rounded, tiny.network(), SPECS, 2)
    given = batch(5, 3)
    found, expected = rounded.run(given), NumpyEngine(tiny.network(), SPECS, 2).run(given)
    assert 0 < np.abs(found - expected).max() <= 2e-2 * max(1.0, np.abs(expected).max())
