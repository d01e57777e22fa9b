"""The columns of logged answers as flat arrays, with the row that each value belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: The arms of explorers that draw orders; see `model_store/exploration/orders.py`.
_DRAWN = re.compile(r"best-\d+")


class Answers:
    """Rows of the table `impressions`."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    @property
    def requests(self) -> int:
        return int(self._table.num_rows)

    @property
    def request_ids(self) -> np.ndarray:
        return self.numbers("request_id")

    def rows(self, indices: np.ndarray) -> Answers:
        """Return some of the rows."""
        return Answers(self._table.take(pa.array(indices)))

    def numbers(self, field: str) -> np.ndarray:
        """Return a column of numbers without nulls."""
        found: np.ndarray = self._table[field].to_numpy()
        return found

    def texts(self, field: str) -> list[str | None]:
        """Return a column of names."""
        found: list[str | None] = pc.cast(self._table[field], pa.string()).to_pylist()
        return found

    def lengths(self, field: str) -> np.ndarray:
        """Return int64, the length of each row's list."""
        found: np.ndarray = pc.list_value_length(self._table[field]).to_numpy().astype(np.int64)
        return found

    def flat(self, field: str) -> np.ndarray:
        """Return the values of all rows' lists of numbers."""
        found: np.ndarray = pc.list_flatten(self._table[field]).to_numpy()
        return found

    def owners(self, field: str) -> np.ndarray:
        """Return int64, the row that each value of `flat` belongs to."""
        return np.repeat(np.arange(self.requests), self.lengths(field))

    def any_of(self, field: str, test: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return bool, the rows with a value that passes a test."""
        found = np.zeros(self.requests, bool)
        found[self.owners(field)[test(self.flat(field))]] = True
        return found

    def expected_lengths(self) -> dict[str, np.ndarray]:
        """Return how long each row's lists must be."""
        pins = self.lengths("pin_ids")
        heads, parties, attributes = (self.lengths(name) for name in ("heads", "parties", "attributes"))
        return {
            "places": pins,
            "utilities": pins,
            "propensities": pins,
            "probabilities": pins * heads,
            "party_utilities": pins * parties,
            "attribute_values": pins * attributes,
            "party_weights": parties,
        }

    def drawn_orders(self) -> np.ndarray:
        """Return bool, the rows whose order was drawn, and does not follow their utilities."""
        arms = self.texts("arm")
        known = {arm: bool(arm and _DRAWN.fullmatch(arm)) for arm in set(arms)}
        return np.array([known[arm] for arm in arms], bool)
