"""A server takes every network that `pinrank train` makes, at the sizes of its variants, with the default limits."""

from __future__ import annotations

import pytest
import torch

from model_store.network.check import RunLimits, check_network
from ranker.export.bundle import Form, export_onnx
from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.network.variants import VARIANTS, network_overrides, sequence_length
from tests.ranker import exported


@pytest.mark.parametrize("form", ["serving", "published"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_largest_run_of_every_variant_fits(name: str, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "LENGTH", max(1, sequence_length(name)))
    torch.manual_seed(2)
    overrides = network_overrides(name)
    network = RankerNetwork(NetworkConfig(heads=3, actions=4, surfaces=2, scalars=4, **overrides))
    taken, specs = exported.read_by(overrides["fusion"], exported.batch())
    content = export_onnx(network, taken, form)
    check_network(content, specs, RunLimits())
