"""Answers, status, metrics and log say what the encoder's products multiplied, and why not what was asked for."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from kernels.cpu.numpy_engine import NumpyEngine
from kernels.engines import LOWERS_PRODUCTS
from server.config import ServerConfig
from tests.conftest import changed
from tests.server.swapping import sample


class Rounding(NumpyEngine):
    """Adds an error to every logit while it multiplies bf16, and then computes only once."""

    products_lacking = ""

    def __init__(self, *given, error: float, products: str, **more) -> None:
        super().__init__(*given, **more)
        self.products_asked, self.error, self.numbers = products, error, "float32"

    def multiply(self, numbers: str) -> None:
        self.numbers = numbers

    def run(self, batch):
        if self.numbers == "bf16":
            return super().run(batch) + self.error
        for _ in range(20):
            super().run(batch)
        return super().run(batch)


@pytest.fixture
def rounding(monkeypatch):
    """Let servers compute with `Rounding`."""

    def use(error: float) -> None:
        def factory(_name, _devices, products):
            return lambda *given, **more: Rounding(*given, error=error, products=products, **more)

        monkeypatch.setattr("server.app.engine_factory", factory)

    return use


async def test_bf16_that_keeps_the_golden_scores_and_is_faster_is_served_and_said(rounding, serve, calls) -> None:
    rounding(1e-4)
    with capture_logs() as logs:
        server = await serve(labels=("stable",), engine_products="bf16")
    answer = await calls(server).rank()
    assert answer.versions.products == "bf16"
    assert sample(server, "pinrank_model_products", version="1", numbers="bf16", asked="bf16") == 1
    assert [line["numbers"] for line in logs if line["event"] == "products_chosen"] == ["bf16"]
    checks = (await calls(server).status()).versions[0].checks
    assert any(check.startswith("products: bf16, because golden scores are within") for check in checks)


async def test_bf16_that_moves_a_golden_score_is_refused_visibly(rounding, serve, calls) -> None:
    rounding(0.1)
    with capture_logs() as logs:
        server = await serve(labels=("stable",), engine_products="bf16")
    answer = await calls(server).rank()
    assert answer.versions.products == "float32"
    assert sample(server, "pinrank_model_products", version="1", numbers="float32", asked="bf16") == 1
    (refused,) = [line for line in logs if line["event"] == "products_refused"]
    assert (refused["log_level"], refused["model"], refused["asked"]) == ("warning", "tiny@1", "bf16")
    assert "expected probability" in refused["why"]
    checks = "\n".join((await calls(server).status()).versions[0].checks)
    assert "products: float32 instead of bf16, because golden row" in checks


async def test_a_network_without_an_encoder_is_served_in_float32_and_says_so(serve, calls) -> None:
    server = await serve(labels=("stable",), engine_products="bf16")
    assert (await calls(server).rank()).versions.products == "float32"
    checks = "\n".join((await calls(server).status()).versions[0].checks)
    assert "products: float32 instead of bf16, because the native kernel does not compute this network's" in checks


async def test_products_that_were_not_asked_for_are_not_tried(rounding, serve, calls) -> None:
    rounding(1e-4)
    server = await serve(labels=("stable",))
    assert (await calls(server).rank()).versions.products == "float32"
    assert "products" not in "\n".join((await calls(server).status()).versions[0].checks)


def test_an_engine_without_such_products_refuses_the_setting(config: ServerConfig) -> None:
    with pytest.raises(ValueError, match=f"engine 'numpy' takes no bf16.*{LOWERS_PRODUCTS[0]}"):
        changed(config, {"engine": "numpy", "engine_products": "bf16"})
