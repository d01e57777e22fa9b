"""How long work reports its progress to whoever waits for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class StepProgress(Protocol):
    """Receives the progress of one step."""

    def __call__(self, done: int, total: int, detail: str = "", /) -> None:
        """Report how much is done, how much there is in total, and a detail to show beside it."""


class Reporter(Protocol):
    """Receives the progress of a recipe."""

    def step(self, what: str) -> AbstractContextManager[StepProgress]:
        """Enter a step; call the function that it yields to report the step's progress."""

    def note(self, message: str) -> None:
        """Report something that is worth reading after the work is done."""
