"""A user's interests as clusters of the pins that the user liked (Pal et al., "PinnerSage", KDD 2020).

One mean of all pins lies between the interests of a user, where no interest is. So the pins are clustered by Ward's
method, which merges the two clusters whose union is tightest, until unions are too wide. Each cluster is represented by
its medoid, a pin that the user really liked, and weighs as much as its pins are many and recent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class InterestSettings:
    """How to cluster.

    Attributes:
        pins_max: how many of the pins that a user liked last are clustered.
        distance: clusters are not merged beyond this distance. It is Ward's, between vectors of length one: the
            Euclidean distance of two pins, and more for larger clusters.
        clusters_max: how many clusters are kept, the most important first.
        half_life_days: the age at which a pin weighs half as much as a new one.
    """

    pins_max: int = 100
    distance: float = 1.2
    clusters_max: int = 20
    half_life_days: float = 30.0


@dataclass(frozen=True, slots=True)
class Interests:
    """The clusters of one user, the most important first.

    Attributes:
        medoids: int64[K], which of the user's pins represent them.
        importances: float64[K], descending; those of all clusters, kept or not, add up to 1.
        clusters: int64[N], the cluster of each pin, -1 for those that were not kept.
    """

    medoids: np.ndarray
    importances: np.ndarray
    clusters: np.ndarray


def interests_of(vectors: np.ndarray, ages_ms: np.ndarray, settings: InterestSettings) -> Interests:
    """Cluster the pins of one user.

    Args:
        vectors: float[N, D], at least one pin, none of them zeros; only their directions count.
        ages_ms: int64[N], how long ago each pin was liked, in milliseconds.
        settings: how to cluster.

    Returns:
        The clusters. Of equally important ones, that with the newest pin comes first; of equal pins, the newest one is
        the medoid.

    Cost: about 0.9 ms for 100 pins of 64 dimensions.
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # noqa: PLC0415 - SciPy comes with the train extra
    from scipy.spatial.distance import pdist  # noqa: PLC0415

    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    count = len(unit)
    found = np.zeros(1, np.int64)
    if count > 1:
        # Given vectors, linkage warns where those of few pins look like distances.
        found = fcluster(linkage(pdist(unit), "ward"), settings.distance, "distance").astype(np.int64) - 1
    sizes = int(found.max()) + 1
    weight = np.exp2(-np.maximum(ages_ms, 0) / (settings.half_life_days * _DAY_MS))
    if not weight.any():  # so old that nothing is left of them: then all pins are as good
        weight = np.ones(count)
    importances = np.bincount(found, weight, sizes) / weight.sum()
    newest = np.full(sizes, np.iinfo(np.int64).max)
    np.minimum.at(newest, found, ages_ms)
    order = np.lexsort((newest, -importances))[: settings.clusters_max]
    medoids = np.array([_medoid(unit, ages_ms, np.flatnonzero(found == cluster)) for cluster in order])
    place = np.full(sizes, -1)
    place[order] = np.arange(len(order))
    return Interests(medoids, importances[order], place[found])


def _medoid(unit: np.ndarray, ages_ms: np.ndarray, members: np.ndarray) -> int:
    """Return the member whose squared distances to the others add up to the least: of unit vectors, by their sum."""
    nearness = np.round(unit[members] @ unit[members].sum(axis=0), 9)  # equal pins are equal in any order of the sum
    return int(members[np.lexsort((ages_ms[members], -nearness))[0]])


@dataclass(frozen=True, slots=True)
class UserInterests:
    """The interests of a user.

    Attributes:
        user: position in the log's `user_ids`.
        pins: int64[N], positions of the pins that were clustered, the newest first.
        interests: the clusters; their numbers are those of `pins`.
    """

    user: int
    pins: np.ndarray
    interests: Interests


def interests_of_log(
    log: ActionLog, vectors: PinEmbeddings, before_ms: int, settings: InterestSettings
) -> Iterator[UserInterests]:
    """Cluster what each user liked.

    Args:
        log: the history; only events strictly before `before_ms` are read.
        vectors: of the pins; pins without one are left out.
        before_ms: Unix time in milliseconds.
        settings: how to cluster.

    Yields:
        The interests of every user who liked a pin with a vector, in the order of the log's users. A pin that was liked
        several times counts once, at its last time.
    """
    for user in range(len(log.user_ids)):
        found = interests_of_user(log, vectors, before_ms, settings, user)
        if found is not None:
            yield found


def interests_of_user(
    log: ActionLog, vectors: PinEmbeddings, before_ms: int, settings: InterestSettings, user: int
) -> UserInterests | None:
    """Return the interests of the user at a position; None if the user liked no pin that has a vector."""
    events = log.by_user[log.user_splits[user] : log.user_splits[user + 1]][::-1]
    events = events[(log.time_ms[events] < before_ms) & (log.schema.affinities[log.action[events]] > 0)]
    _, first = np.unique(log.pin[events], return_index=True)
    events = events[np.sort(first)]
    numbers = vectors.of(log.pin_ids[log.pin[events]]).astype(np.float32)
    known = np.flatnonzero(numbers.any(axis=1))[: settings.pins_max]
    if not len(known):
        return None
    chosen = events[known]
    found = interests_of(numbers[known], before_ms - log.time_ms[chosen], settings)
    return UserInterests(user, log.pin[chosen], found)
