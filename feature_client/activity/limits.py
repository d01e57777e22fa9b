"""How many actions, and of how many new users, a process stores in a short time. Pure.

The times of actions come from their producers, who may spread a burst over months, so that these limits go by the
server's clock.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np

#: A limit of so many per second admits what these seconds would, at once.
BURST_S = 10.0
#: Keys share this many places, 1 MiB of memory. Two keys share one with a probability of 1 in 65,536, and are then
#: limited together.
_PLACE_BITS = 16


class Rate:
    """Admits so many per second, and those of `BURST_S` seconds at once."""

    def __init__(self, per_s: float) -> None:
        """Create a full bucket; 0 admits everything."""
        self._per_s = per_s
        self._tokens = self._burst = _burst(per_s)
        self._at_s = float("-inf")

    def take(self, wanted: int, now_s: float) -> int:
        """Return how many of `wanted` are admitted."""
        if not self._per_s:
            return wanted
        passed_s = max(0.0, now_s - self._at_s)  # the clock may step back
        self._tokens, self._at_s = min(self._burst, self._tokens + passed_s * self._per_s), now_s
        admitted = min(wanted, int(self._tokens))
        self._tokens -= admitted
        return admitted


class KeyedRates:
    """Admits so many events of each key per second, and those of `BURST_S` seconds at once; a key is such as a user.

    Keys have places in a table of fixed size, by a secret hash, so that nobody can choose which share one. One without
    events for `BURST_S` seconds is as if it had never had any.
    """

    def __init__(self, per_s: float, random_bits: Callable[[int], int] = secrets.randbits) -> None:
        """Create full buckets; 0 admits everything."""
        self._per_s = per_s
        self._burst = _burst(per_s)
        self._key, self._factors = np.uint64(random_bits(64)), [np.uint64(random_bits(64) | 1) for _ in range(2)]
        self._tokens = np.full(1 << _PLACE_BITS if per_s else 0, self._burst)
        self._at_s = np.zeros(len(self._tokens))

    def take(self, keys: np.ndarray, wanted: np.ndarray, now_s: float) -> np.ndarray:
        """Return int64[K], how many of int64[K] events of uint64[K] keys, all different, are admitted."""
        if not self._per_s:
            return wanted
        places = self._places(keys)
        passed_s = np.maximum(0.0, now_s - self._at_s[places])
        tokens = np.minimum(self._burst, self._tokens[places] + passed_s * self._per_s)
        self._tokens[places], self._at_s[places] = tokens, now_s
        admitted: np.ndarray = np.minimum(wanted, np.maximum(0.0, tokens).astype(np.int64))
        np.subtract.at(self._tokens, places, admitted)  # below 0 if several keys share a place
        return admitted

    def _places(self, keys: np.ndarray) -> np.ndarray:
        mixed = (keys ^ self._key) * self._factors[0]
        mixed = (mixed ^ mixed >> np.uint64(32)) * self._factors[1]
        return np.asarray(mixed >> np.uint64(64 - _PLACE_BITS))


def _burst(per_s: float) -> float:
    return max(1.0, per_s * BURST_S)


class WriteLimits:
    """The limits of the writes into one sequence group.

    Attributes:
        full: set while the store has no room for new users.
    """

    def __init__(self, new_users_per_s: float = 0.0, user_actions_per_s: float = 0.0) -> None:
        """Create the limits; 0 means none.

        Args:
            new_users_per_s: how many users without a stored sequence get one.
            user_actions_per_s: how many new actions of each user are stored.
        """
        self.full = False
        self._new_users = Rate(new_users_per_s)
        self._user_rates = KeyedRates(user_actions_per_s)

    def begin(self, user_ids: np.ndarray, now_s: float) -> Grants:
        """Return the grants of one write for uint64[U] users, all different."""
        return Grants(self, user_ids, now_s)

    def take_users(self, wanted: int, now_s: float) -> int:
        """Return how many of `wanted` new users are admitted."""
        return 0 if self.full else self._new_users.take(wanted, now_s)

    def take_actions(self, user_ids: np.ndarray, wanted: np.ndarray, now_s: float) -> np.ndarray:
        """Return int64[U], how many of int64[U] new actions of uint64[U] users are admitted."""
        return self._user_rates.take(user_ids, wanted, now_s)


class Grants:
    """What one write was granted. A write that another writer interrupts tries again, and takes nothing twice."""

    def __init__(self, limits: WriteLimits, user_ids: np.ndarray, now_s: float) -> None:
        self._limits, self._user_ids, self._now_s = limits, user_ids, now_s
        self._is_admitted = np.zeros(len(user_ids), bool)
        self._actions = np.zeros(len(user_ids), np.int64)

    def new_users(self, positions: np.ndarray) -> np.ndarray:
        """Return bool[K], which users, by their int64[K] positions, may get a sequence; the first come first."""
        asking = positions[~self._is_admitted[positions]]
        self._is_admitted[asking[: self._limits.take_users(len(asking), self._now_s)]] = True
        admitted: np.ndarray = self._is_admitted[positions]
        return admitted

    def actions(self, positions: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return int64[K], how many of int64[K] new actions of users, by their positions, are stored."""
        more = np.maximum(0, wanted - self._actions[positions])
        if more.any():
            self._actions[positions] += self._limits.take_actions(self._user_ids[positions], more, self._now_s)
        return np.asarray(np.minimum(wanted, self._actions[positions]))
