"""Which request an action belongs to: a pure function of the sets of requests and actions, in whatever order they come.

An action that names its request belongs to it, or to none. Any other action belongs to the newest request that showed
its pin to its user within the window before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Why an action belongs to no request; the index is the code in `Attributed.reason`, where 0 means that it belongs.
REASONS = (
    "",
    "no_such_request",  # the log has no request of that id
    "request_left_out",  # the request contradicts itself in the log, or its order does not follow from its scores
    "other_user",  # the request was another user's
    "pin_not_shown",  # the request, or any request of the user, did not show the pin
    "other_position",  # the request showed the pin at another position
    "before_shown",  # it happened before the pin was shown
    "after_window",  # it happened too late after the pin was shown
    "not_selected",  # its request is in the log, but not among those wanted
    "pin_without_scores",  # the request showed the pin behind those that the server had the time to score
)
_CODE = {reason: code for code, reason in enumerate(REASONS)}

#: How many pairs of an action and a shown pin are compared at once; bounds the memory for large answers.
_PAIRS_MAX = 4_000_000


@dataclass(frozen=True, slots=True)
class Window:
    """How long after a request an action counts, and how much two clocks may differ.

    Attributes:
        after_ms: the longest delay of an action.
        skew_ms: an action that seems to be at most this much earlier than its request counts as at it.
    """

    after_ms: int
    skew_ms: int

    def holds(self, delay_ms: np.ndarray) -> np.ndarray:
        """Return bool[A], which delays of int64[A] count."""
        return np.asarray((delay_ms >= -self.skew_ms) & (delay_ms <= self.after_ms))


@dataclass(frozen=True, slots=True)
class Requests:
    """R requests, in order of time and then request id; the position of a request here is its number.

    Attributes:
        request_ids: uint64[R], unique.
        user_ids: uint64[R].
        time_ms: int64[R].
        by_id: int64[R], the numbers in order of request ids.
    """

    request_ids: np.ndarray
    user_ids: np.ndarray
    time_ms: np.ndarray
    by_id: np.ndarray

    @staticmethod
    def of(request_ids: np.ndarray, user_ids: np.ndarray, time_ms: np.ndarray) -> Requests:
        order = np.lexsort((request_ids, time_ms))
        ids = request_ids[order]
        return Requests(ids, user_ids[order], time_ms[order], np.argsort(ids, kind="stable"))

    def numbers(self, request_ids: np.ndarray) -> np.ndarray:
        """Return int64[N], the numbers of uint64[N] ids; -1 for an id that is not among them."""
        return positions_in(self.request_ids[self.by_id], request_ids, self.by_id)


def positions_in(known: np.ndarray, wanted: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """Return int64[N], where each of N wanted values is in ascending `known`; -1 where it is not.

    With `numbers`, int64[len(known)], return the number at that place instead.
    """
    if not len(known):
        return np.full(len(wanted), -1)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    found = places if numbers is None else numbers[places]
    return np.where(known[places] == wanted, found, -1)


@dataclass(frozen=True, slots=True)
class Actions:
    """A distinct actions, in order of time, then user, then event id.

    Attributes:
        event_ids: uint64[A].
        user_ids: uint64[A].
        pin_ids: uint64[A].
        action: int32[A], positions in `names`.
        surface: int32[A], positions in `surfaces`.
        time_ms: int64[A], the producer's clock.
        received_ms: int64[A], the server's clock.
        request_ids: uint64[A]; 0 if the producer did not say.
        positions: int64[A]; -1 if the producer did not say.
        names: the actions, sorted.
        surfaces: the surfaces, sorted.
    """

    event_ids: np.ndarray
    user_ids: np.ndarray
    pin_ids: np.ndarray
    action: np.ndarray
    surface: np.ndarray
    time_ms: np.ndarray
    received_ms: np.ndarray
    request_ids: np.ndarray
    positions: np.ndarray
    names: tuple[str, ...]
    surfaces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attributed:
    """Where each of A actions belongs.

    Attributes:
        request: int64[A], the number of its request; -1 if it belongs to none.
        position: int64[A], of its pin in the answer; -1 if it belongs to none.
        reason: uint8[A], position in `REASONS`.
        delay_ms: int64[A], from the request to the action, negative within the clock skew; 0 if it belongs to none.
        jumped: bool[A], whether its time misses the window although it was received within it.
    """

    request: np.ndarray
    position: np.ndarray
    reason: np.ndarray
    delay_ms: np.ndarray
    jumped: np.ndarray


class Attribution:
    """Attributes actions to requests, whose pins come in parts and in any order.

    Args:
        actions: all actions.
        requests: all requests.
        window: how long after a request an action counts.
    """

    def __init__(self, actions: Actions, requests: Requests, window: Window) -> None:
        self._actions, self._requests, self._window = actions, requests, window
        count = len(actions.event_ids)
        named = actions.request_ids != 0
        self._request = np.where(named, requests.numbers(actions.request_ids), -1)
        self._position = np.full(count, -1)
        self._reason = np.zeros(count, np.uint8)
        self._reason[named & (self._request < 0)] = _CODE["no_such_request"]
        # A request that never comes, because it was left out, keeps this.
        self._reason[self._request >= 0] = _CODE["request_left_out"]
        self._direct = np.flatnonzero(self._request >= 0)
        self._direct = self._direct[np.argsort(self._request[self._direct], kind="stable")]
        self._searched = np.flatnonzero(~named)
        self._users = np.unique(actions.user_ids[self._searched])
        self._pins = np.unique(actions.pin_ids[self._searched])
        self._pairs = np.unique(self._pair(actions.user_ids[self._searched], actions.pin_ids[self._searched]))
        self._shown: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, numbers: np.ndarray, splits: np.ndarray, pin_ids: np.ndarray) -> None:
        """Take some requests with their pins. Each request may come once.

        Args:
            numbers: int64[r], ascending, of requests.
            splits: int64[r + 1], where the pins of each begin.
            pin_ids: uint64[n], in the order of the answers.
        """
        self._add_direct(numbers, splits, pin_ids)
        self._add_searched(numbers, splits, pin_ids)

    def result(self) -> Attributed:
        """Return where each action belongs, once all requests have come."""
        actions, window = self._actions, self._window
        delay_ms = np.zeros(len(self._request), np.int64)
        jumped = np.zeros(len(self._request), bool)
        shown = self._reason == 0
        direct = self._direct[shown[self._direct]]
        shown_ms = self._requests.time_ms[self._request[direct]]
        delay_ms[direct] = actions.time_ms[direct] - shown_ms
        self._reason[direct] = _late_or_early(delay_ms[direct], window)
        jumped[direct] = (self._reason[direct] > 0) & window.holds(actions.received_ms[direct] - shown_ms)
        if len(self._searched):
            pairs, numbers, places = self._sorted_hits()
            keys = self._pair(actions.user_ids[self._searched], actions.pin_ids[self._searched])
            hit, reason = self._newest(pairs, numbers, keys, actions.time_ms[self._searched])
            _, by_receipt = self._newest(pairs, numbers, keys, actions.received_ms[self._searched])
            self._reason[self._searched] = reason
            jumped[self._searched] = (reason > 0) & (by_receipt == 0)
            found = self._searched[reason == 0]
            self._request[found], self._position[found] = numbers[hit[reason == 0]], places[hit[reason == 0]]
            delay_ms[found] = actions.time_ms[found] - self._requests.time_ms[self._request[found]]
        lost = self._reason > 0
        request, position = np.where(lost, -1, self._request), np.where(lost, -1, self._position)
        return Attributed(request, position, self._reason, np.where(lost, 0, delay_ms), jumped)

    def _add_direct(self, numbers: np.ndarray, splits: np.ndarray, pin_ids: np.ndarray) -> None:
        """Find the pin of each action that names one of these requests."""
        targets = self._request[self._direct]
        first, stop = np.searchsorted(targets, (numbers[0], numbers[-1] + 1)) if len(numbers) else (0, 0)
        local = positions_in(numbers, targets[first:stop])
        own = self._direct[first:stop][local >= 0]
        starts, counts = splits[:-1][local[local >= 0]], np.diff(splits)[local[local >= 0]]
        bounds = np.searchsorted(np.cumsum(counts), np.arange(0, counts.sum() + _PAIRS_MAX, _PAIRS_MAX))
        for start, end in zip(bounds, [*bounds[1:], len(own)], strict=True):
            part = slice(start, end)
            self._compare(own[part], starts[part], counts[part], pin_ids)

    def _compare(self, own: np.ndarray, starts: np.ndarray, counts: np.ndarray, pin_ids: np.ndarray) -> None:
        actions = self._actions
        if not len(own):
            return
        which = np.repeat(np.arange(len(own)), counts)
        place = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        equal = np.flatnonzero(pin_ids[starts[which] + place] == actions.pin_ids[own[which]])
        matched, at = np.unique(which[equal], return_index=True)
        position = np.full(len(own), -1)
        position[matched] = place[equal[at]]  # a pin that was shown twice counts at its better position
        wanted = actions.positions[own]
        stated = wanted >= 0
        there = stated & (wanted < counts)
        there[there] = pin_ids[starts[there] + wanted[there]] == actions.pin_ids[own[there]]
        self._reason[own] = np.select(
            [self._requests.user_ids[self._request[own]] != actions.user_ids[own], position < 0, stated & ~there],
            [_CODE["other_user"], _CODE["pin_not_shown"], _CODE["other_position"]],
            0,
        )
        self._position[own] = np.where(there, wanted, position)

    def _add_searched(self, numbers: np.ndarray, splits: np.ndarray, pin_ids: np.ndarray) -> None:
        """Keep where these requests showed a pin to a user who then acted on it without naming a request."""
        if not len(self._searched):
            return
        local = np.flatnonzero(positions_in(self._users, self._requests.user_ids[numbers]) >= 0)
        counts = np.diff(splits)[local]
        which = np.repeat(local, counts)
        place = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        pins = pin_ids[splits[which] + place]
        known = positions_in(self._pins, pins) >= 0
        which, place = which[known], place[known]
        pairs = self._pair(self._requests.user_ids[numbers[which]], pins[known])
        wanted = positions_in(self._pairs, pairs) >= 0
        self._shown.append((pairs[wanted], numbers[which[wanted]], place[wanted]))

    def _pair(self, user_ids: np.ndarray, pin_ids: np.ndarray) -> np.ndarray:
        """Return int64[N], a number for each user and pin, which both occur in actions without a request."""
        return np.searchsorted(self._users, user_ids) * len(self._pins) + np.searchsorted(self._pins, pin_ids)

    def _sorted_hits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pair, request number and position of each hit, int64[H], by pair, then time, then position."""
        none = np.empty(0, np.int64)
        pairs, numbers, places = (
            (np.concatenate([none, *column]) for column in zip(*self._shown, strict=True))
            if (self._shown)
            else (none, none, none)
        )
        order = np.lexsort((places, numbers, pairs))
        pairs, numbers, places = pairs[order], numbers[order], places[order]
        first = np.ones(len(pairs), bool)
        first[1:] = (pairs[1:] != pairs[:-1]) | (numbers[1:] != numbers[:-1])
        return pairs[first], numbers[first], places[first]

    def _newest(
        self, pairs: np.ndarray, numbers: np.ndarray, keys: np.ndarray, time_ms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return int64[A], the hit that each action belongs to, and uint8[A], the reason why it belongs to none.

        Hits and actions are sorted into one row by pair and time; the newest hit before an action is then the last one
        to its left, and the hit after it the first one to its right.
        """
        hits, count = len(pairs), len(keys)
        if not hits:
            return np.full(count, -1), np.full(count, _CODE["pin_not_shown"], np.uint8)
        shown_ms = self._requests.time_ms[numbers]
        is_action = np.arange(hits + count) >= hits
        order = np.lexsort((is_action, np.concatenate([shown_ms, time_ms]), np.concatenate([pairs, keys])))
        acts = is_action[order]
        left = np.maximum.accumulate(np.where(acts, -1, order))
        right = np.minimum.accumulate(np.where(acts, hits, order)[::-1])[::-1]
        before, after = np.empty(count, np.int64), np.empty(count, np.int64)
        before[order[acts] - hits], after[order[acts] - hits] = left[acts], right[acts]
        has_before = (before >= 0) & (pairs[before] == keys)
        has_after = (after < hits) & (pairs[np.minimum(after, hits - 1)] == keys)
        in_window = has_before & (time_ms - shown_ms[before] <= self._window.after_ms)
        in_skew = has_after & (shown_ms[np.minimum(after, hits - 1)] - time_ms <= self._window.skew_ms)
        reason = np.select(
            [in_window | in_skew, has_before, has_after],
            [0, _CODE["after_window"], _CODE["before_shown"]],
            _CODE["pin_not_shown"],
        )
        return np.where(in_window, before, after), reason.astype(np.uint8)


def _late_or_early(delay_ms: np.ndarray, window: Window) -> np.ndarray:
    return np.select(
        [delay_ms < -window.skew_ms, delay_ms > window.after_ms], [_CODE["before_shown"], _CODE["after_window"]], 0
    ).astype(np.uint8)
