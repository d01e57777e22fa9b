"""From neighbourhoods, a graph and tasks to a trained network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from feature_client.groups import DIM_MAX
from ranker.data.embeddings import content_digest
from ranker.embedding.graph.graph import Graph
from ranker.embedding.graph.materialised import features_in
from ranker.embedding.graph.parts import Parts
from ranker.embedding.graph.walks import WalkSettings
from ranker.embedding.network_archive import weights_of
from ranker.embedding.pins.inputs import read_inputs
from ranker.embedding.pins.network import PinNetworkSettings
from ranker.embedding.pins.tasks import GRAPH, Tasks, examples_of
from ranker.embedding.pins.trained import VERSION, AboutNetwork, TrainedPins
from ranker.embedding.pins.training import PinEpoch, PinTraining, train_pins
from ranker.embedding.vector_file import latest_ms
from ranker.errors import DatasetError, SettingError


def train_producer(
    name: str,
    neighbourhoods: Parts,
    graph: Graph,
    walks: WalkSettings,
    tasks: Tasks,
    folder: Path,
    sizes: PinNetworkSettings,
    training: PinTraining,
    made_by: str = "",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    note: Callable[[PinEpoch], None] = lambda _epoch: None,
) -> TrainedPins:
    """Train a network.

    Args:
        name: of the spaces of its vectors.
        neighbourhoods: of the pins of `graph`.
        graph: whose contexts are examples.
        walks: how the neighbours were found.
        tasks: what to train for.
        folder: where the files that tasks name are.
        sizes: of the network.
        training: how to train.
        made_by: the command, which the file of the network will hold.
        progress: called with the number of steps done, and how many there are at most.
        note: called after each epoch.

    Raises:
        DatasetError: a file cannot be read, or the neighbourhoods are of other pins than the graph.
        SettingError: the vectors would be longer than a space allows.
        DivergedError: the loss is no longer finite.
    """
    inputs = read_inputs(neighbourhoods, walks.neighbours)
    if not np.array_equal(inputs.pin_ids, graph.pin_ids):
        raise DatasetError(f"{neighbourhoods.folder} has other pins than the graph; pass the one that it was made of")
    if (width := sizes.width(inputs.features.shape[1])) > DIM_MAX:
        raise SettingError(
            f"the vectors would have {width:,} numbers, and a space has {DIM_MAX:,} at most; use fewer features"
        )
    examples = examples_of(tasks, graph, folder)
    network = train_pins(inputs, graph, examples, sizes, training, progress, note)
    # Files of tasks do not say when their edges came to be.
    dated = all(task.sets == GRAPH for task in tasks.tasks)
    given = content_digest(asdict(training), graph.content, *(one.content for one in examples))
    weights = [part for item in weights_of(network).items() for part in item]
    about = AboutNetwork(
        version=VERSION,
        name=name,
        settings=asdict(sizes),
        tasks=tuple(task.name for task in tasks.tasks),
        features=tuple(features_in(neighbourhoods)),
        width=inputs.features.shape[1],
        neighbours=inputs.index.shape[1],
        walks=asdict(walks),
        content=content_digest(VERSION, neighbourhoods.content, given, inputs.pin_ids, *weights),
        until_ms=latest_ms(graph.until_ms, neighbourhoods.until_ms) if dated else None,
        made_by=made_by,
    )
    return TrainedPins(network, inputs.pin_ids, inputs.features.astype(np.float16), about)
