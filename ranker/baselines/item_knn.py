"""Item-based collaborative filtering: pins that people like the user acted on (Sarwar et al., WWW 2001).

The similarity of two pins is the cosine between their sets of users. A candidate's score is the sum of its similarities
to the pins of the user's sequence. All of them count: a sequence holds at most as many pins as the usual number of
neighbours.
"""

from __future__ import annotations

import numpy as np

from ranker.data.actions import ActionLog
from ranker.training.examples import Examples


def item_knn_scores(log: ActionLog, examples: Examples, heads: tuple[str, ...], history_max: int) -> np.ndarray:
    """Score each row of the examples by co-actions before the start of the row's slice.

    The similarity of a pin h of the sequence and a candidate c, for a head, is

        |users who acted on h and gave c the head's action| / sqrt(|users of h| * |users of c|)

    Args:
        log: the history.
        examples: the rows.
        heads: actions of the log.
        history_max: number of the user's newest actions that count.

    Returns:
        float32[N, H].

    Cost: per request, one pass over the users of its pins; no matrix of pins is made.
    """
    columns = [log.schema.position(head) for head in heads]
    found = np.zeros((len(examples.pins), len(heads)), np.float32)
    splits = examples.batch.row_splits
    for as_of_ms in np.unique(examples.snapshot_ms):
        pairs = _UsersOfPins.before(log, int(as_of_ms), columns)
        for number in np.flatnonzero(examples.snapshot_ms == as_of_ms):
            user, activity = examples.users[number], examples.activity[number]
            own = log.by_user[log.user_splits[user] : log.user_splits[user] + activity]
            rows = slice(int(splits[number]), int(splits[number + 1]))
            found[rows] = pairs.scores(log.pin[own[-history_max:]], examples.pins[rows])
    return found


class _UsersOfPins:
    """The distinct users of every pin, with the actions that each gave it."""

    def __init__(self, splits: np.ndarray, users: np.ndarray, gave: np.ndarray, users_all: int) -> None:
        self._splits, self._users, self._gave, self._users_all = splits, users, gave, users_all
        self._norms = np.sqrt(np.maximum(np.diff(splits), 1))

    @staticmethod
    def before(log: ActionLog, time_ms: int, columns: list[int]) -> _UsersOfPins:
        stop, users_all = log.before(time_ms), len(log.user_ids)
        pair, index = np.unique(log.pin[:stop] * users_all + log.user[:stop], return_inverse=True)
        pins, users = np.divmod(pair, users_all)
        gave = np.stack([np.bincount(index, log.labels[:stop, c], len(pair)) > 0 for c in columns], axis=1)
        splits = np.searchsorted(pins, np.arange(len(log.pin_ids) + 1))
        return _UsersOfPins(splits, users, gave.astype(np.float32), users_all)

    def scores(self, acted: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return float32[C, H] for candidates of a user who acted on these pins; both are positions in the log."""
        # Summing over the users in the outer loop needs no pair of pins: first what each user shares with this one.
        acted = np.unique(acted)
        of_pin, places = self._entries(acted)
        shared = np.bincount(self._users[places], 1 / self._norms[acted][of_pin], self._users_all)
        of_pin, places = self._entries(candidates)
        weighed = self._gave[places] * shared[self._users[places]][:, None]
        sums = [np.bincount(of_pin, column, len(candidates)) for column in weighed.T]
        return np.asarray(np.stack(sums, axis=1) / self._norms[candidates][:, None], np.float32)

    def _entries(self, pins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return int64[K] twice: for each user of each of the pins, the number of the pin and the place of the pair."""
        starts, counts = self._splits[pins], self._splits[pins + 1] - self._splits[pins]
        of_pin = np.repeat(np.arange(len(pins)), counts)
        return of_pin, np.arange(len(of_pin)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
