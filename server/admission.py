from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Admitted:
    pass


@dataclass(frozen=True, slots=True)
class Refused:
    """Refused before any work was spent on it."""

    reason: str
    retry_after_s: float


class Admission:
    """Bounds what is in flight. Pure state: `offer` takes a place, `release` gives it back."""

    def __init__(self, requests_max: int, rows_max: int) -> None:
        self._requests_max = requests_max
        self._rows_max = rows_max
        self.requests = 0
        self.rows = 0

    def offer(self, rows: int, clear_s: float) -> Admitted | Refused:
        """Take a place for `rows` rows, or refuse.

        Args:
            rows: candidates of the request.
            clear_s: predicted seconds until what is in flight is done; what a refused caller is told to wait.
        """
        if self.requests >= self._requests_max:
            return Refused(f"{self.requests} requests in flight, the limit is {self._requests_max}", clear_s)
        # A request larger than the limit is served when it is alone: refusing it for ever would be a broken promise.
        if self.requests and self.rows + rows > self._rows_max:
            return Refused(f"{self.rows} rows in flight and {rows} more asked, the limit is {self._rows_max}", clear_s)
        self.requests += 1
        self.rows += rows
        return Admitted()

    def release(self, rows: int) -> None:
        self.requests -= 1
        self.rows -= rows
