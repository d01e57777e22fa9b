from __future__ import annotations

import io

from rich.console import Console

from ranker.cli.console import ConsoleReporter


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def told(*steps: tuple[float, int]) -> list[str]:
    """Report (seconds since the start, done of 1,000) to a step without a terminal; return what it printed."""
    clock, out = Clock(), io.StringIO()
    reporter = ConsoleReporter(Console(file=out, width=40), clock)
    with reporter.step("training") as progress:
        for after_s, done in steps:
            clock.now_s = 100.0 + after_s
            progress(done, 1000, f"loss {done}")
    return [line for line in out.getvalue().splitlines() if "━" not in line and line.strip()]


def test_without_a_terminal_a_step_says_every_ten_seconds_how_far_it_is() -> None:
    steps = [(0.0, 0), (4.0, 100), (10.0, 250), (15.0, 300), (19.9, 400), (20.0, 500), (40.0, 1000)]
    assert told(*steps) == [
        "training: 250 of 1,000 in 10 s, about 30 s left, loss 250",
        "training: 500 of 1,000 in 20 s, about 20 s left, loss 500",
    ]


def test_a_short_step_prints_no_line() -> None:
    assert told((0.0, 0), (5.0, 500), (9.0, 1000)) == []


def test_work_of_an_earlier_run_does_not_count_towards_the_speed() -> None:
    assert told((0.0, 800), (10.0, 850)) == ["training: 850 of 1,000 in 10 s, about 30 s left, loss 850"]
    assert told((0.0, 800), (10.0, 800)) == ["training: 800 of 1,000 in 10 s, loss 800"]
