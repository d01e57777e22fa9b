"""The contract of explorers: what the server asks of them for each request, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from model_store.exploration.hashing import mixed
from model_store.exploration.native_policy import NativePolicy


@dataclass(frozen=True, slots=True)
class Tuned:
    """The request does not explore; it gets the order by the tuned weights."""


@dataclass(frozen=True, slots=True)
class Withheld:
    """The request explores, but the order of its arm gives up more than `regret_max`; it gets the tuned order."""

    arm: str


@dataclass(frozen=True, slots=True)
class Explored:
    """The request explores, and gets this order. It may equal the tuned one.

    Attributes:
        arm: the arm that ordered it, as the log names it.
        order: int64[K], positions of the answered candidates in the request.
        utilities: float32[N], those in force: by the arm's weights, or the tuned ones if only the order was drawn.
        party_weights: float64[P], the weights that `utilities` follow, in the utility table's order of parties.
        regret: the value of the tuned order minus that of `order`, both by the tuned utilities (see `regret`).
        tuned_value: the value of the tuned order.
    """

    arm: str
    order: np.ndarray
    utilities: np.ndarray
    party_weights: np.ndarray
    regret: float
    tuned_value: float


Decision = Tuned | Withheld | Explored
#: What every request that does not explore gets.
TUNED = Tuned()


@dataclass(frozen=True, slots=True)
class Propensities:
    """How probable an answer was, over all requests with the same candidates and utilities.

    Attributes:
        order: the probability of the whole order, in (0, 1].
        positions: float64[K], the probability that the pin at position k is there, in (0, 1].
    """

    order: float
    positions: np.ndarray


class Explorer(Protocol):
    """Explores the requests of one surface. Immutable and pure: any thread may call it."""

    @property
    def arms(self) -> tuple[str, ...]:
        """The names that `Explored.arm` and `Withheld.arm` can have."""

    @property
    def native(self) -> NativePolicy:
        """This explorer for native code."""

    def explores(self, request_id: int) -> bool:
        """Say whether a request explores. Cost: about 1 us; call it first, as most requests do not."""

    def explore(
        self,
        request_id: int,
        pin_ids: np.ndarray,
        party_utilities: np.ndarray,
        utilities: np.ndarray,
        top_k: int = 0,
    ) -> Decision:
        """Choose the order of a request. The same request gets the same answer again.

        Args:
            request_id: its unsigned 64-bit id.
            pin_ids: uint64[N], its candidates.
            party_utilities: float64[N, P], parties in the utility table's order.
            utilities: float32[N], by the tuned weights; those that are not finite stay at the end.
            top_k: how many candidates are answered; 0 for all.

        Returns:
            `Tuned` if the request does not explore, `Withheld` if its arm's order is beyond `regret_max`, or
            `Explored` with an order within it.
        """

    def propensities(self, party_utilities: np.ndarray, order: np.ndarray) -> Propensities:
        """Compute how probable an answer was, exactly; also for the tuned order of a request that did not explore.

        Args:
            party_utilities: float64[N, P], of all N candidates of the request.
            order: int64[K], the order that was answered: different positions of candidates, at least one.

        Raises:
            ValueError: there is another number of parties, or the order is none.

        Cost: about 10 us for 128 candidates and 4 arms; `propensities` takes many answers at once, for less.
        """

    def propensities_in_numpy(self, party_utilities: np.ndarray, order: np.ndarray) -> Propensities:
        """Do the same in NumPy: the reference, without a check of the arguments. Cost: up to 0.1 ms."""

    def replay(
        self, request_id: int, arm: str | None, pin_ids: np.ndarray, places: np.ndarray, utilities: np.ndarray
    ) -> np.ndarray:
        """Order the pins of a logged answer again.

        Args:
            request_id: the logged id.
            arm: the logged arm; None if the tuned order was answered.
            pin_ids: uint64[K], in any order.
            places: uint32[K], their positions in the request.
            utilities: float32[K], those of the answer.

        Returns:
            int64[K], positions in `pin_ids`, in the order that was answered.
        """


class Lots:
    """Draws which requests explore, and numbers for those that do, all from the seed and the request's id."""

    def __init__(self, seed: int, share: float) -> None:
        """Store the seed, 0 to 2**64 - 1, and the share of the requests that explore, in (0, 1]."""
        self._key = mixed(seed)
        self._threshold = int(share * 2.0**64)  # exact: a float times a power of two

    def explores(self, request_id: int) -> bool:
        """See `Explorer`."""
        return mixed(request_id ^ self._key) < self._threshold

    def draw(self, request_id: int) -> int:
        """Return a number in [0, 2**64) that is independent of whether the request explores."""
        return mixed(mixed(request_id ^ self._key))


def propensities_of(order: float, positions: np.ndarray) -> Propensities:
    """Return propensities without what rounding put above 1."""
    return Propensities(min(1.0, order), np.minimum(positions, 1.0))


def replay_by_utility(places: np.ndarray, utilities: np.ndarray) -> np.ndarray:
    """Order the pins of a logged answer by their utilities, as `select` did for the whole request.

    Args:
        places: uint32[K], their positions in the request.
        utilities: float32[K], those of the answer.

    Returns:
        int64[K], positions in `places`.
    """
    key = np.where(np.isfinite(utilities), -utilities, np.inf)
    return np.lexsort((places, key))
