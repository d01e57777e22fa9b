"""The vectors of pins as of any time, by one network: what a ranker learns from is what a store will hold.

The graph grows with each action, the network and its space stay. A pin that is newer than the network has a vector from
its first edge on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from feature_client.groups import EmbeddingSpace
from ranker.data.actions import ActionLog
from ranker.data.embeddings import PinEmbeddings
from ranker.data.folding import folded_vectors
from ranker.embedding.graph.edges import Edges, LogEdges
from ranker.embedding.graph.graph import Graph, build_graph
from ranker.embedding.graph.materialised import joined
from ranker.embedding.graph.walks import WalkSettings, neighbours_of
from ranker.embedding.pins.inputs import uniform_hops
from ranker.embedding.pins.trained import TrainedPins, by_neighbours
from ranker.embedding.vector_file import refuse_after
from ranker.errors import SettingError

#: Vectors of several times that are kept.
_KEPT_BYTES = 1 << 30
#: Pins whose neighbours are in memory at a time.
_AT_ONCE = 2_048


def vectors_over(
    trained: TrainedPins, edges: Edges, features: PinEmbeddings, task: str, pin_ids: np.ndarray | None = None
) -> PinEmbeddings:
    """Walk over a graph and return the vectors of its pins.

    Args:
        trained: the network, whose file says how to walk.
        edges: of the graph.
        features: of the pins, as of the same time.
        task: whose vectors.
        pin_ids: uint64[N], the pins that are wanted; None for all of the graph.

    Returns:
        Vectors of the pins that are wanted and in the graph.

    Raises:
        DatasetError: there is no edge.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph = build_graph(Path(folder) / "graph", edges)
        pins = np.arange(len(graph.pin_ids))
        if pin_ids is not None:
            pins = pins[np.isin(graph.pin_ids, pin_ids)]
        by_batch = _by_batch(trained, graph, features, pins)
        found = [by_task[task].numpy().astype(np.float16) for by_task in by_batch]
        space = trained.about.space(task)
        return PinEmbeddings(graph.pin_ids[pins], np.concatenate([np.zeros((0, space.dim), np.float16), *found]), space)


def _by_batch(
    trained: TrainedPins, graph: Graph, features: PinEmbeddings, pins: np.ndarray
) -> Iterator[dict[str, torch.Tensor]]:
    if trained.network.settings.variant == "khop":
        table = trained.known_of(features.of(graph.pin_ids), graph.pin_ids)
        for first in range(0, len(pins), _AT_ONCE):
            some = pins[first : first + _AT_ONCE]
            with torch.no_grad():
                hops = uniform_hops(graph, some, np.random.default_rng(first))
                yield trained.network(table[torch.from_numpy(some)], table, hops)
        return
    walks = WalkSettings(**trained.about.walks)  # type: ignore[arg-type]  # its file was checked
    for first in range(0, len(pins), _AT_ONCE):
        some = pins[first : first + _AT_ONCE]
        found = neighbours_of(graph, some, walks)
        part = joined(graph.pin_ids[some], found.splits, graph.pin_ids[found.pins], found.weights, [features])
        yield by_neighbours(trained, part)


def features_as_of(trained: TrainedPins, log: ActionLog, before_ms: int) -> PinEmbeddings:
    """Return the features of a log's pins as of a time: those of the training, and for newer pins what users say.

    A user is the mean of the pins that the user liked, and a newer pin is the mean of its users, both of length one.
    """
    space = EmbeddingSpace(name="features", version=1, dim=trained.about.width)
    return folded_vectors(log, PinEmbeddings(trained.pin_ids, trained.features, space), before_ms)


@dataclass(frozen=True, slots=True)
class NetworkVectors:
    """Vectors of pins that a network makes anew for each time: `ranker.data.embeddings.PinVectors`.

    Attributes:
        trained: the network.
        task: whose vectors.
    """

    trained: TrainedPins
    task: str
    _known: dict[int, tuple[ActionLog, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(trained: TrainedPins, task: str | None = None) -> NetworkVectors:
        """Return the vectors of a task; of the first one by default. Raises SettingError for an unknown task."""
        tasks = trained.about.tasks
        if task is not None and task not in tasks:
            raise SettingError(f"the network has no task {task!r}; it has {', '.join(tasks)}")
        return NetworkVectors(trained, task or tasks[0])

    @property
    def space(self) -> EmbeddingSpace:
        return self.trained.about.space(self.task)

    def as_of(self, log: ActionLog, before_ms: int) -> np.ndarray:
        """Return float16[P, D], zeros for pins without an edge. Results are kept: several models ask for the same."""
        stop = log.before(before_ms)
        known = self._known.get(stop)
        if known is not None and known[0] is log:
            return known[1]
        found = np.zeros((len(log.pin_ids), self.space.dim), np.float16)
        if (log.schema.affinities[log.action[:stop]] > 0).any():
            features = features_as_of(self.trained, log, before_ms)
            found = vectors_over(self.trained, LogEdges(log, before_ms), features, self.task).of(log.pin_ids)
        self._known[stop] = log, found
        while len(self._known) * found.nbytes > _KEPT_BYTES and len(self._known) > 1:
            del self._known[next(iter(self._known))]
        return found

    def refuse_after(self, until_ms: int) -> None:
        """Do what `GivenVectors.refuse_after` says."""
        refuse_after("networks of pins", self.trained.about.until_ms, until_ms)

    def saved(self, log: ActionLog, before_ms: int) -> PinEmbeddings:
        """Do what `GivenVectors.saved` says."""
        found = self.as_of(log, before_ms)
        known = np.flatnonzero(found.any(axis=1))
        known = known[np.argsort(log.pin_ids[known])]
        return PinEmbeddings(log.pin_ids[known], found[known], self.space)
