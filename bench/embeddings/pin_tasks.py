"""Train one network of pins for three tasks, and one for each: are vectors of several tasks as good as those of one?

Grocery reviews: what somebody buys later (co-save), what goes with an item (complement), and what can replace it
(substitute). A fifth of the pairs of the latter two is held out, both directions of a pair together, and of both tasks.
All networks read the same graph, of reviews before the training's window ends, and the same features. Each is trained
with three seeds, and the recalls of a user or item are the mean of the three.

The dataset must be in `data/grocery`; create it with `pinrank data grocery SOURCE --out data/grocery`.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.embeddings.producing import neighbourhoods_until, svd_until
from bench.engines.lift import DATA, read_dataset
from bench.harness import Claim, Conclusion, Raw
from ranker.data.actions import action_log
from ranker.data.embeddings import PinEmbeddings
from ranker.data.requests import Split, producer_until_ms
from ranker.embedding.graph.edges import CONTEXT, PIN, Edges, LogEdges, ParquetEdges
from ranker.embedding.pins.network import PinNetworkSettings
from ranker.embedding.pins.producer import train_producer
from ranker.embedding.pins.tasks import GRAPH, Task, Tasks
from ranker.embedding.pins.trained import vectors_of
from ranker.embedding.pins.training import PinTraining
from ranker.embedding.retrieval import Questions, Scorer, by_vectors, questions, ranked, recalls
from ranker.evaluation.bootstrap import RESAMPLES, resample

#: Of the trainings; the first is also that of the features and the intervals.
SEEDS = (7, 8, 9)
CUTOFF = 20
#: By column of the items' file.
PAIRS = {"complement": "complements:token_seq", "substitute": "substitutes:token_seq"}
#: Share of the pairs that is held out.
HELD_OUT = 0.2
SIZES = PinNetworkSettings(variant="pooled", dim=64, trained_dim=64)
TRAINING = PinTraining(epochs_max=30, patience=3, batch=512)
CAVEATS = (
    "complements and substitutes are what a shop's pages said, not what a person judged",
    "the intervals are over users and items, for the mean of the trainings; other seeds give others",
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The questions of a task; of pairs, the item that asks is not the only known one."""

    questions: Questions
    asking: np.ndarray | None

    def recalls(self, vectors: PinEmbeddings) -> np.ndarray:
        """Return float64[C], the recall of each user or item that asks."""
        scorer = by_vectors(self.questions, vectors)
        if self.asking is not None:
            numbers = vectors.of(self.questions.pin_ids).astype(np.float32)
            asking, findable = self.asking, scorer.findable
            scorer = Scorer(lambda rows: np.where(findable, numbers[asking[rows]] @ numbers.T, -np.inf), findable)
        return recalls(self.questions, ranked(self.questions, scorer), CUTOFF)


def measure(*, quick: bool = False, data: Path = DATA) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if the data is missing."""
    log = action_log(read_dataset("grocery", data))
    until_ms = producer_until_ms(log, Split())
    training = replace(TRAINING, epochs_max=1) if quick else TRAINING
    seeds = SEEDS[:2] if quick else SEEDS
    raw: Raw = {"cutoff": CUTOFF, "seeds": list(seeds), "held_out": HELD_OUT, "tasks": {}}
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        folder = Path(temporary)
        graph, walks, joined = neighbourhoods_until(log, until_ms, folder, svd_until(log, until_ms, SEEDS[0]))
        asked = {"co-save": _Asked(questions(LogEdges(log, until_ms), LogEdges(log, None, since_ms=until_ms)), None)}
        for name, column in PAIRS.items():
            asked[name] = _divided(data / "grocery" / "grocery.item", column, graph.pin_ids, folder, name)
        tasks = [Task(name="co-save", sets=GRAPH), *(Task(name=name, pairs=f"{name}.parquet") for name in PAIRS)]

        def trained(chosen: list[Task], seed: int) -> dict[str, np.ndarray]:
            """Train one network, and return the recalls of its tasks."""
            tasks, own = Tasks(tasks=tuple(chosen)), replace(training, seed=seed)
            made = train_producer("bench", joined, graph, walks, tasks, folder, SIZES, own)
            return {name: asked[name].recalls(one) for name, one in vectors_of(made, joined, graph).items()}

        together = [trained(tasks, seed) for seed in seeds]
        for task in tasks:
            alone = np.stack([trained([task], seed)[task.name] for seed in seeds])
            raw["tasks"][task.name] = _compared(np.stack([found[task.name] for found in together]), alone)
            yield raw


def _compared(together: np.ndarray, alone: np.ndarray) -> dict[str, Any]:
    """Compare float64[S, C] recalls of S trainings each, with intervals over the C users or items."""
    contexts = np.arange(together.shape[1])
    columns = [np.ones(len(contexts)), together.mean(axis=0), alone.mean(axis=0)]
    sums = resample(contexts, np.stack(columns, axis=1), RESAMPLES, SEEDS[0])
    found = {"together": sums[1] / sums[0], "alone": sums[2] / sums[0], "over": (sums[1] - sums[2]) / sums[2]}
    return {
        "questions": len(contexts),
        "each": {"together": together.mean(axis=1).tolist(), "alone": alone.mean(axis=1).tolist()},
        **{name: asdict(one.estimate()) for name, one in found.items()},
    }


def _divided(path: Path, column: str, known: np.ndarray, folder: Path, name: str) -> _Asked:
    """Write the pairs to learn from, and return the questions of the others."""
    with path.open() as file:
        pairs = {
            (min(item, other), max(item, other))
            for row in csv.DictReader(file, delimiter="\t")
            for item, other in ((int(row["item_id:token"]), int(text)) for text in row[column].split())
            if item != other
        }
    ends = np.array(sorted(pairs), np.uint64)
    ends = ends[np.isin(ends, known).all(axis=1)]
    # The same pairs for all tasks, as most substitutes are complements, too.
    mixed = (ends[:, 0] * np.uint64(0x9E3779B97F4A7C15) + ends[:, 1]) * np.uint64(0xD1342543DE82EF95)
    held = (mixed >> np.uint64(40)) < np.uint64(HELD_OUT * 2**24)
    parts = {"learned": ends[~held], "held": ends[held]}
    both = {part: np.concatenate([one, one[:, ::-1]]) for part, one in parts.items()}
    files: dict[str, Edges] = {}
    itself = np.stack([known, known], axis=1)
    for part, edges in {**both, "known": np.concatenate([itself, both["learned"]])}.items():
        target = folder / (f"{name}.parquet" if part == "learned" else f"{name}-{part}.parquet")
        pq.write_table(pa.table({CONTEXT: pa.array(edges[:, 0]), PIN: pa.array(edges[:, 1])}), target)
        files[part] = ParquetEdges(target)
    found = questions(files["known"], files["held"])
    # Contexts are items, in ascending order: those that have a held-out partner.
    return _Asked(found, np.searchsorted(found.pin_ids, np.unique(both["held"][:, 0])))


def _shown(mean: Raw, each: list[float]) -> str:
    return f"{mean['value']:.4f} ({', '.join(f'{one:.4f}' for one in each)})"


def conclude(raw: Raw) -> Conclusion:
    lines = [
        f"recall@{raw['cutoff']}: the mean of the trainings (each).",
        "",
        "| task | one network for all tasks | for this one | difference, 95% interval |",
        "|---|---|---|---|",
    ]
    summary: dict[str, float | None] = {}
    for name, found in raw["tasks"].items():
        together, alone, over = found["together"], found["alone"], found["over"]
        lines.append(
            f"| {name} | {_shown(together, found['each']['together'])} | {_shown(alone, found['each']['alone'])} | "
            f"{over['value']:+.1%} [{over['low']:+.1%}, {over['high']:+.1%}] |"
        )
        summary[f"{name}: recall@{raw['cutoff']}, all tasks"] = together["value"]
        summary[f"{name}: recall@{raw['cutoff']}, this task"] = alone["value"]
    equal = sum(found["over"]["value"] >= 0 for found in raw["tasks"].values())
    claim = Claim("tasks on which one network for all equals one for each", float(equal), 2.0, "tasks", "at_least")
    lines += ["", *(f"- Not shown: {caveat}" for caveat in CAVEATS)]
    return Conclusion(summary, (claim,), "\n".join(lines) + "\n")
