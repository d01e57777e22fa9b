"""What the vectors of pins are trained for: a TOML file of tasks, and the examples of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from feature_client.groups import Frozen
from ranker.data.embeddings import content_digest
from ranker.data.schema import read_toml
from ranker.embedding.graph.edges import Edges, edges_in
from ranker.embedding.graph.graph import Graph
from ranker.embedding.lists import Lists, lists_of
from ranker.errors import DatasetError

#: The name by which a task reads the sets of the graph itself.
GRAPH = "graph"


class Task(Frozen):
    """One thing that the vectors are trained for. It has either sets or pairs.

    Attributes:
        name: lower-case letters, digits and hyphens; the vectors' space is named after it.
        sets: `graph`, or a file of edges as for `pinrank embed walks`: a part of a context's pins should find the rest.
        pairs: a file of edges whose contexts are pins: a pin should find those that belong to it.
        weight: of its loss.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=24)]
    sets: Annotated[str, Field(min_length=1)] | None = None
    pairs: Annotated[str, Field(min_length=1)] | None = None
    weight: Annotated[float, Field(gt=0, le=1_000)] = 1.0

    @model_validator(mode="after")
    def _has_one_source(self) -> Task:
        if (self.sets is None) == (self.pairs is None):
            raise ValueError(f"task {self.name!r} needs either sets or pairs")
        return self


class Tasks(Frozen):
    """The tasks of a file, the first of which is the main one."""

    tasks: Annotated[tuple[Task, ...], Field(min_length=1, max_length=16)]

    @model_validator(mode="after")
    def _names_differ(self) -> Tasks:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("two tasks have the same name")
        return self


#: Without a file: what a context brings together should be close.
CO_SAVE = Tasks(tasks=(Task(name="co-save", sets=GRAPH),))


def read_tasks(path: Path) -> Tasks:
    """Read a file of tasks. Raises SettingError that names every mistake."""
    return read_toml(path, Tasks, "tasks")


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of a task.

    Attributes:
        task: the task.
        lists: pins that should be found, as positions in a graph; for sets, those that ask, too.
        asking: int64[C], the position of the pin that asks for each list, ascending; None for sets.
        known: of each example, pins that should not be found, as what it asks is what else there is.
    """

    task: Task
    lists: Lists
    asking: np.ndarray | None
    known: Lists | None = None

    @property
    def count(self) -> int:
        return len(self.lists.splits) - 1

    @property
    def content(self) -> str:
        """The digest of the examples."""
        asking = np.zeros(0, np.int64) if self.asking is None else self.asking
        return content_digest(self.task.name, self.task.weight, self.lists.splits, self.lists.pins, asking)


def examples_of(tasks: Tasks, graph: Graph, folder: Path) -> list[Examples]:
    """Read the examples of all tasks.

    Args:
        tasks: the tasks.
        graph: the graph; pins that it lacks are left out.
        folder: where the files that tasks name are.

    Raises:
        DatasetError: a file cannot be read, or has no example.
    """
    return [_examples(task, graph, folder) for task in tasks.tasks]


def _examples(task: Task, graph: Graph, folder: Path) -> Examples:
    name = task.sets or task.pairs or GRAPH
    if task.sets == GRAPH:
        contexts = np.repeat(np.arange(len(graph.contexts.starts) - 1), np.diff(graph.contexts.starts))
        _, lists = lists_of(contexts, np.asarray(graph.contexts.others, np.int64))
    else:
        contexts, lists = _read(edges_in(folder / name), graph, pairs=task.pairs is not None)
    found = Examples(task, lists, contexts if task.pairs is not None else None)
    enough = np.diff(lists.splits) >= (1 if task.pairs is not None else 2)
    if not enough.any():
        raise DatasetError(f"task {task.name!r}: {name} has no example whose pins are in the graph")
    return chosen(found, np.flatnonzero(enough))


def chosen(examples: Examples, numbers: np.ndarray) -> Examples:
    """Return some of the examples."""
    asking = None if examples.asking is None else examples.asking[numbers]
    known = None if examples.known is None else examples.known.only(numbers)
    return Examples(examples.task, examples.lists.only(numbers), asking, known)


def _read(edges: Edges, graph: Graph, *, pairs: bool) -> tuple[np.ndarray, Lists]:
    """Return contexts, as positions of pins if they are pins, and the pins of each; edges of others are left out."""
    contexts, pins = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for context_ids, pin_ids in edges.batches():
        pin = _positions(graph.pin_ids, pin_ids)
        context = _positions(graph.pin_ids, context_ids) if pairs else context_ids.astype(np.uint64).view(np.int64)
        known = pin >= 0
        if pairs:
            known &= (context >= 0) & (context != pin)
        contexts.append(context[known])
        pins.append(pin[known])
    return lists_of(np.concatenate(contexts), np.concatenate(pins))


def _positions(known: np.ndarray, pin_ids: np.ndarray) -> np.ndarray:
    """Return int64[N], the positions of pins among ascending ones; -1 for those that are not there."""
    index = np.searchsorted(known, pin_ids).clip(max=len(known) - 1)
    return np.where(known[index] == pin_ids, index, -1)
