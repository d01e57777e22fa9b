"""The requests of a load test: ids from ranges or files, popular pins more often, equal bytes for equal seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.errors import LoadError
from pinrank.v1 import ranking_pb2

IDS_MAX = 10_000_000
#: As wide as the field on the wire.
TOP_K_MAX = 2**32 - 1

_RANGE = re.compile(r"^(\d+)-(\d+)$")
#: Number of first draws per candidate; repeats are dropped.
_DRAWS = 4


class WorkloadError(LoadError):
    """A workload is invalid; the message names the fix."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of random users over pins with power-law popularity.

    Attributes:
        user_ids: uint64[U], most active first.
        pin_ids: uint64[P], distinct, most popular first.
        candidates: pairs of a number of candidates and its weight; each request draws its number from them.
        popularity: the pin at position i of `pin_ids` has weight (i + 1) ** -popularity; 0 makes all pins equal.
        user_popularity: the same for users.
        surface: surface of every request.
        label: model label of every request; empty leaves the choice to the server.
        top_k: number of pins that every request asks for; 0 asks for all.
        seed: random seed; equal seeds give equal bytes.
    """

    user_ids: np.ndarray
    pin_ids: np.ndarray
    candidates: tuple[tuple[int, float], ...] = ((128, 1.0),)
    popularity: float = 0.8
    surface: str = "home"
    seed: int = 0
    user_popularity: float = 0.0
    label: str = ""
    top_k: int = 0

    def __post_init__(self) -> None:
        if not len(self.user_ids) or not len(self.pin_ids):
            raise WorkloadError("a workload needs at least one user and one pin")
        if len(np.unique(self.pin_ids)) != len(self.pin_ids):
            raise WorkloadError("the pin ids repeat; list each pin only once")
        if not self.candidates or any(not 0 < weight < math.inf for _, weight in self.candidates):
            raise WorkloadError("a workload needs at least one number of candidates, each with a finite weight above 0")
        for name, exponent in (("popularity", self.popularity), ("user popularity", self.user_popularity)):
            if not 0 <= exponent < math.inf:
                raise WorkloadError(f"the {name} must be a finite number of at least 0, but is {exponent:g}")
        if not 0 <= self.top_k <= TOP_K_MAX:
            raise WorkloadError(f"top_k must be at least 0 and at most {TOP_K_MAX:,}, but is {self.top_k}")
        if self.seed < 0:
            raise WorkloadError(f"the seed must be at least 0, but is {self.seed}")
        wrong = [count for count, _ in self.candidates if not 1 <= count <= len(self.pin_ids)]
        if wrong:
            raise WorkloadError(
                f"{wrong[0]} candidates per request from {len(self.pin_ids)} pins are impossible; add pins"
            )

    def requests(self, count: int) -> Iterator[bytes]:
        """Yield `count` serialised RankRequests; candidates within one are distinct.

        Cost: about 0.1 ms for 128 of 5,000 pins; where few popular pins hold most of the weight, O(P) each.
        """
        rng = np.random.default_rng(self.seed)
        weights = np.arange(1, len(self.pin_ids) + 1, dtype=np.float64) ** -self.popularity
        cumulative = np.cumsum(weights / weights.sum())
        sizes = np.array([size for size, _ in self.candidates])
        shares = np.array([weight for _, weight in self.candidates])
        activity = np.arange(1, len(self.user_ids) + 1, dtype=np.float64) ** -self.user_popularity
        users = rng.choice(len(self.user_ids), count, p=activity / activity.sum())
        for size, user in zip(rng.choice(sizes, count, p=shares / shares.sum()), users, strict=True):
            user_id = self.user_ids[user]
            pins = self.pin_ids[_distinct(rng, weights, cumulative, int(size))]
            request = ranking_pb2.RankRequest(
                user_id=int(user_id), pin_ids=pins.tolist(), surface=self.surface, top_k=self.top_k
            )
            if self.label:
                request.label = self.label
            yield request.SerializeToString()


def _distinct(rng: np.random.Generator, weights: np.ndarray, cumulative: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` distinct positions one after the other, each by weight among those not yet drawn.

    Dropping repeats from independent draws gives this distribution. The remaining positions are drawn at once, as those
    with the largest `log(weight) + Gumbel noise`, which gives the same distribution (Yellott 1977).
    """
    drawn = np.searchsorted(cumulative, rng.random(_DRAWS * count), side="right").clip(max=len(weights) - 1)
    _, first = np.unique(drawn, return_index=True)
    chosen = drawn[np.sort(first)][:count]
    missing = count - len(chosen)
    if missing:
        keys = np.log(weights) + rng.gumbel(size=len(weights))
        keys[chosen] = -np.inf
        chosen = np.concatenate([chosen, np.argsort(-keys, kind="stable")[:missing]])
    return chosen


def read_ids(source: str, array: str) -> np.ndarray:
    """Read ids from a range `FIRST-LAST`, a JSON list, a .npy file, or a .npz file.

    Args:
        source: the range, or the path of the file.
        array: array of a .npz file to read, unless the file has only one.

    Returns:
        uint64[N], in the order of the source.

    Raises:
        WorkloadError: the source is neither a range nor a readable file, or does not contain ids.
    """
    if found := _RANGE.match(source):
        first, last = int(found[1]), int(found[2])
        if not first <= last < 2**64 or last - first >= IDS_MAX:
            raise WorkloadError(f"range {source}: the first id must not exceed the last, at most {IDS_MAX:,} ids")
        return np.arange(first, last + 1, dtype=np.uint64)
    path = Path(source)
    try:
        ids = _read_file(path, array)
    except (OSError, ValueError, OverflowError, EOFError) as error:
        raise WorkloadError(f"cannot read ids from {source}: {error} (a range is FIRST-LAST, e.g. 1-1000)") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or (ids.dtype.kind == "i" and ids.min() < 0):
        raise WorkloadError(
            f"{source} contains {ids.dtype}{list(ids.shape)} instead of one row of whole numbers from 0 up"
        )
    if len(ids) > IDS_MAX:
        raise WorkloadError(f"{source} contains {len(ids):,} ids, but the limit is {IDS_MAX:,}")
    return ids.astype(np.uint64)


def _read_file(path: Path, array: str) -> np.ndarray:
    if path.suffix not in {".npy", ".npz"}:
        listed = json.loads(path.read_text())
        # NumPy would read a list with numbers above int64 as inexact floats.
        if not isinstance(listed, list) or any(type(value) is not int for value in listed):
            raise ValueError("it is not a JSON list of whole numbers")
        return np.array(listed, np.uint64)
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded as archive:
        names = archive.files
        if array not in names and len(names) != 1:
            raise ValueError(f"it contains the arrays {names}, but none named {array!r}")
        found: np.ndarray = archive[array if array in names else names[0]]
        return found


def parse_candidates(text: str) -> tuple[tuple[int, float], ...]:
    """Parse `128`, or a distribution `COUNT:WEIGHT,...` such as `32:5,128:4,1000:1`. Raises WorkloadError."""
    pairs = []
    for part in text.split(","):
        count, _, weight = part.partition(":")
        try:
            pairs.append((int(count), float(weight or 1)))
        except ValueError as error:
            raise WorkloadError(f"candidates {text!r}: write 128, or COUNT:WEIGHT pairs such as 32:5,128:4") from error
    return tuple(pairs)
