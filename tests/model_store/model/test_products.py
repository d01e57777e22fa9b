"""What the products of an encoder multiply is chosen by what is possible, correct and faster, in this order."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.engine import FeatureBatch
from model_store.model.products import Products, choose_products

SAMPLE = FeatureBatch({}, {}, np.array([0, 3], np.int32))


class Lowering:
    """Records what it is told to multiply, and each run."""

    tolerance = 0.0

    def __init__(self, asked: str = "bf16", lacking: str = "") -> None:
        self.products_asked, self.products_lacking = asked, lacking
        self.numbers, self.ran, self.batch = "float32", list[str](), SAMPLE

    def multiply(self, numbers: str) -> None:
        self.numbers = numbers

    def run(self, batch: FeatureBatch) -> None:
        self.ran.append(self.numbers)
        self.batch = batch


def chosen(engine, sample=SAMPLE, fault: str | None = None, float32_ms: float = 2.0, bf16_ms: float = 1.0) -> Products:
    def seconds(runs, _rounds, _pause):
        for run in runs.values():
            run()
        return {"float32": float32_ms / 1e3, "bf16": bf16_ms / 1e3}

    def golden() -> str | None:
        engine.run(SAMPLE)
        return fault

    return choose_products(engine, golden, sample, seconds=seconds)


def test_correct_and_faster_products_are_used_and_their_times_told() -> None:
    engine = Lowering()
    found = chosen(engine)
    assert (found.numbers, found.refused, engine.numbers) == ("bf16", False, "bf16")
    assert engine.ran == ["bf16", "float32", "bf16"]  # the golden requests, and a run of each
    assert "took 1 ms, and 2 ms in float32" in str(found)


@pytest.mark.parametrize("bf16_ms", [2.0, 2.5])
def test_products_that_are_not_faster_are_refused(bf16_ms: float) -> None:
    engine = Lowering()
    found = chosen(engine, bf16_ms=bf16_ms)
    assert (found.numbers, found.refused, engine.numbers) == ("float32", True, "float32")
    assert str(found).startswith("products: float32 instead of bf16, because 128 rows took 2")


def test_a_first_request_without_actions_does_not_decide_alone() -> None:
    engine = Lowering()
    chosen(engine, FeatureBatch({"user": np.arange(3)}, {"pin": np.arange(5)}, np.array([0, 1, 1, 5], np.int32)))
    batch = engine.batch
    assert batch.request["user"].tolist() == [0, 2]  # the one in between has no rows
    assert batch.row_splits.tolist() == [0, 64, 128]
    assert set(batch.candidate["pin"][:64]) == {0}
    assert batch.candidate["pin"][64:70].tolist() == [1, 2, 3, 4, 1, 2]


def test_products_that_move_a_golden_score_are_refused_before_they_are_timed() -> None:
    engine = Lowering()
    found = chosen(engine, fault="golden row 3 is off")
    assert str(found) == "products: float32 instead of bf16, because golden row 3 is off"
    assert (engine.ran, engine.numbers) == (["bf16"], "float32")


def test_what_the_processor_lacks_is_told_without_a_run() -> None:
    engine = Lowering(lacking="this processor has no instruction for it")
    found = chosen(engine)
    assert str(found) == "products: float32 instead of bf16, because this processor has no instruction for it"
    assert engine.ran == []


def test_where_nothing_is_asked_nothing_is_tried() -> None:
    engine = Lowering(asked="float32")
    assert chosen(engine) == Products("float32", "float32")
    assert engine.ran == []


def test_an_engine_without_a_choice_tells_what_it_multiplies() -> None:
    class OnGpu:
        tolerance = 0.01

    assert chosen(OnGpu()) == Products("half", "half")
