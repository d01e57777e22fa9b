"""A trained network of pins as a file, and the vectors that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from feature_client.groups import EmbeddingSpace, Frozen
from ranker.data.embeddings import PinEmbeddings, content_digest
from ranker.embedding.graph.graph import Graph
from ranker.embedding.graph.materialised import Neighbourhoods, features_in, read_neighbourhoods
from ranker.embedding.graph.parts import Parts
from ranker.embedding.network_archive import decode_archive, encode_archive, write_archive
from ranker.embedding.pins.inputs import rows_of, uniform_hops
from ranker.embedding.pins.network import Hop, PinNetwork, PinNetworkSettings
from ranker.errors import DatasetError

#: Version of the producer. Raise it when the same weights would give other vectors.
VERSION = 1
_FEATURES = "features"
#: Pins whose vectors are computed at a time.
_AT_ONCE = 4_096


class AboutNetwork(Frozen):
    """What a file says about the network in it.

    Attributes:
        version: of the producer.
        name: of the embedding spaces, before the name of the task.
        settings: fields of PinNetworkSettings.
        tasks: names of the tasks, the main one first.
        features: the spaces of the pins' features, in their order.
        width: F, the numbers of these features.
        neighbours: K, the most neighbours of a pin.
        walks: fields of WalkSettings, with which these were found.
        content: digest of the weights, and of all that they were trained with.
        until_ms: Unix time in milliseconds; it has learned from events before it. None if they have no times.
        made_by: the command that trained it.
    """

    version: int
    name: str
    settings: dict[str, str | bool | int | float]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    features: tuple[str, ...]
    width: Annotated[int, Field(ge=1)]
    neighbours: Annotated[int, Field(ge=1)]
    walks: dict[str, int | float]
    content: str
    until_ms: int | None
    made_by: str = ""

    def sizes(self) -> PinNetworkSettings:
        """Return the settings. Raises TypeError or SettingError for others than a network can have."""
        return PinNetworkSettings(**self.settings)  # type: ignore[arg-type]  # the network refuses other values

    def space(self, task: str) -> EmbeddingSpace:
        """Return the space of a task's vectors."""
        dim = self.sizes().width(self.width)
        content = content_digest(self.content, task)
        return EmbeddingSpace(name=f"{self.name}-{task}", version=self.version, dim=dim, content=content)


@dataclass(frozen=True, slots=True)
class TrainedPins:
    """A trained network.

    Attributes:
        network: in evaluation mode.
        pin_ids: uint64[P], ascending, the pins of its training.
        features: float16[P, F], their features.
        about: what its file says.
    """

    network: PinNetwork
    pin_ids: np.ndarray
    features: np.ndarray
    about: AboutNetwork

    def known_of(self, features: np.ndarray, pin_ids: np.ndarray) -> torch.Tensor:
        """Return float32[N, F + trained_dim]; the trained vector of a pin that is newer than the training is zero."""
        index = np.searchsorted(self.pin_ids, pin_ids).clip(max=len(self.pin_ids) - 1)
        known = torch.from_numpy(self.pin_ids[index] == pin_ids)[:, None]
        trained = self.network.trained.detach()[torch.from_numpy(index)] * known
        return torch.cat([torch.from_numpy(features.astype(np.float32)), trained], dim=1)


def write_network(path: Path, trained: TrainedPins) -> None:
    """Write a network; the file appears when it is complete."""
    arrays = {_FEATURES: trained.features}
    write_archive(path, encode_archive(trained.about, trained.pin_ids, trained.network, arrays))


def read_network(path: Path) -> TrainedPins:
    """Read what `write_network` has written.

    Raises:
        DatasetError: the file does not exist, is damaged, or is of another version. The message names the fix.
    """
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; train a network with `pinrank embed pins`")
    try:
        archive = decode_archive(path.read_bytes())
        about = AboutNetwork.model_validate_json(archive.about)
        pin_ids, features = archive.pin_ids, archive.arrays[_FEATURES]
        if features.shape != (len(pin_ids), about.width):
            raise ValueError(f"it has features of the shape {features.shape} for {len(pin_ids)} pins")
        network = PinNetwork(about.sizes(), about.width, about.neighbours, len(pin_ids), about.tasks)
        network.load_state_dict(archive.weights)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DatasetError(f"{path} holds no network of pins ({error}); train it with `pinrank embed pins`") from error
    if about.version != VERSION:
        raise DatasetError(f"{path} is of version {about.version}, and this pinrank reads {VERSION}; train it again")
    return TrainedPins(network.eval(), pin_ids, features, about)


def vectors_of(
    trained: TrainedPins,
    neighbourhoods: Parts,
    graph: Graph | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, PinEmbeddings]:
    """Return the vectors of all pins of some neighbourhoods, by task, reading these from front to end.

    Args:
        trained: the network.
        neighbourhoods: of the same features as those of the training; pins may be newer.
        graph: of the same pins, for a network that draws neighbours by itself.
        progress: called with the number of pins done, and how many there are.

    Raises:
        DatasetError: the features are others, or a file is damaged.
    """
    found = features_in(neighbourhoods)
    if tuple(found) != trained.about.features:
        raise DatasetError(
            f"the network reads {', '.join(trained.about.features)} as features, and {neighbourhoods.folder} has "
            f"{', '.join(found)}; run `pinrank embed materialise` with the former"
        )
    if trained.network.settings.variant == "khop":
        if graph is None:
            raise DatasetError("a network of the variant khop draws neighbours from the graph, which is missing")
        batches = _by_hops(trained, neighbourhoods, graph)
    else:
        batches = ((part.pin_ids, by_neighbours(trained, part)) for part in read_neighbourhoods(neighbourhoods))
    pins: list[np.ndarray] = []
    vectors: dict[str, list[np.ndarray]] = {task: [] for task in trained.about.tasks}
    done = 0
    for pin_ids, by_task in batches:
        pins.append(pin_ids)
        for task, numbers in by_task.items():
            vectors[task].append(numbers.numpy().astype(np.float16))
        done += len(pin_ids)
        progress(done, neighbourhoods.pins)
    pin_ids = np.concatenate(pins)
    return {
        task: PinEmbeddings(pin_ids, np.concatenate(parts), trained.about.space(task))
        for task, parts in vectors.items()
    }


@torch.no_grad()
def by_neighbours(trained: TrainedPins, part: Neighbourhoods) -> dict[str, torch.Tensor]:
    """Return float32[N, D] by task, the vectors of some pins."""
    own = trained.known_of(part.features, part.pin_ids)
    table = trained.known_of(part.neighbour_features, part.neighbours)
    if not len(table):  # no pin has a neighbour: what is never read has to be there
        table = own[:1]
    found: dict[str, torch.Tensor] = trained.network(own, table, [rows_of(part, trained.about.neighbours)])
    return found


def _by_hops(
    trained: TrainedPins, neighbourhoods: Parts, graph: Graph
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    parts = [(part.pin_ids, part.features) for part in read_neighbourhoods(neighbourhoods)]
    pin_ids, features = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not np.array_equal(pin_ids, graph.pin_ids):
        raise DatasetError(f"the graph has other pins than {neighbourhoods.folder}; pass the one that it was made of")
    table = trained.known_of(features, pin_ids)
    for first in range(0, len(pin_ids), _AT_ONCE):
        pins = np.arange(first, min(first + _AT_ONCE, len(pin_ids)))
        hops: Sequence[Hop] = uniform_hops(graph, pins, np.random.default_rng(first))
        with torch.no_grad():
            yield pin_ids[pins], trained.network(table[torch.from_numpy(pins)], table, hops)
