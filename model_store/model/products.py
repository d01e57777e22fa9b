"""Chooses what the products of an engine's encoder multiply: float32, or fewer bits if those are correct and faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernels.cost import fastest_s, mixed
from kernels.engine import Engine, FeatureBatch, LowersProducts

#: About how many rows the runs have that are compared, and how often each runs.
_ROWS, _ROUNDS = 128, 6


@dataclass(frozen=True, slots=True)
class Products:
    """What the products of a loaded model's encoder multiply.

    Attributes:
        numbers: `float32` or `bf16`; `half` on GPUs, which multiply bf16 or float16 (see gpu.md).
        asked: what the settings ask for. Sums are float32 in any case.
        why: why float32 instead of what was asked for, or what the choice rests on; empty if there was none.
    """

    numbers: str
    asked: str
    why: str = ""

    @classmethod
    def of(cls, engine: Engine) -> Products:
        """Return what an engine multiplies as it was opened."""
        numbers = "half" if engine.tolerance else "float32"
        return cls(numbers, numbers)

    @property
    def refused(self) -> bool:
        """Whether the model was asked for fewer bits and computes in float32 instead."""
        return self.numbers != self.asked

    def __str__(self) -> str:
        instead = f" instead of {self.asked}" if self.refused else ""
        return f"products: {self.numbers}{instead}" + (f", because {self.why}" if self.why else "")


def choose_products(
    engine: Engine,
    fault: Callable[[], str | None],
    sample: FeatureBatch,
    pause: Callable[[], None] = lambda: None,
    seconds: Callable[..., dict[str, float]] = fastest_s,
) -> Products:
    """Let an engine multiply what it is asked for, if that is possible, correct and faster; float32 if not.

    Args:
        engine: as it was opened: multiplying float32, or on a GPU.
        fault: runs the golden requests and says what is wrong with their scores, or None.
        sample: at least one request with at least one row, to compare the speeds with.
        pause: called between runs.
        seconds: measures the fastest of several runs by name.

    Raises:
        EngineError: a run failed.
    """
    if not isinstance(engine, LowersProducts) or engine.products_asked == "float32":
        return Products.of(engine)
    asked = engine.products_asked
    if engine.products_lacking:
        return Products("float32", asked, engine.products_lacking)
    engine.multiply(asked)
    pause()
    found = fault()
    if found:
        engine.multiply("float32")
        return Products("float32", asked, found)
    batch = mixed(sample, _ROWS)  # one request alone may have no sequence, and nothing to multiply

    def run(numbers: str) -> Callable[[], None]:
        def once() -> None:
            engine.multiply(numbers)
            engine.run(batch)

        return once

    spent_s = seconds({numbers: run(numbers) for numbers in ("float32", asked)}, _ROUNDS, pause)
    times = spent_s["float32"] / spent_s[asked]
    faster = times > 1
    numbers = asked if faster else "float32"
    engine.multiply(numbers)
    measured = f"{batch.rows} rows took {1e3 * spent_s[asked]:.3g} ms, and {1e3 * spent_s['float32']:.3g} ms in float32"
    return Products(numbers, asked, f"golden scores are within their tolerance and {measured}" if faster else measured)
