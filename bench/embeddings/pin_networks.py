"""Compare networks of pins on real saves: which pins a user saved besides those that are known.

37,501 users and 9,796 pins of Pinterest (Geng et al., 2015, in the form of later papers), without times. The known
saves are the graph; a user asks with the mean of the known pins' vectors, and should find the held-out ones among all
others. No network has a parameter of a user. The data may not be passed on: put train.txt and test.txt, a line a user,
into data/pinterest-saves, or name their folder in the environment variable PINTEREST_SAVES_DATA.

Pins have no content here. All networks read the same random vectors as features, which tell pins apart and say nothing
of them: what neighbours add shows. One more has a trained vector for each pin besides.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.lift import DATA
from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from feature_client.groups import EmbeddingSpace
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.graph.edges import ListEdges
from ranker.embedding.graph.graph import build_graph
from ranker.embedding.graph.materialised import materialise
from ranker.embedding.graph.neighbours import graph_folder, make_neighbours
from ranker.embedding.graph.walks import WalkSettings
from ranker.embedding.pins.network import PinNetworkSettings
from ranker.embedding.pins.producer import train_producer
from ranker.embedding.pins.tasks import CO_SAVE
from ranker.embedding.pins.trained import read_network, vectors_of, write_network
from ranker.embedding.pins.training import PinTraining
from ranker.embedding.retrieval import by_popularity, by_vectors, questions, ranked, recall_difference, retrieval
from ranker.embedding.vector_file import SavedVectors, VectorsOrigin

SEED, CUTOFF, FEATURES = 7, 20, 256
SIZES = PinNetworkSettings(dim=64, trained_dim=0, own_dropped=0.1)
NETWORKS = {
    "khop": replace(SIZES, variant="khop"),
    "pooled": replace(SIZES, variant="pooled"),
    "transformer": replace(SIZES, variant="transformer"),
    "pooled, with trained vectors": replace(SIZES, variant="pooled", trained_dim=64),
}
TRAINING = PinTraining(epochs_max=14, seed=SEED)
CAVEATS = (
    "held-out saves are the only right answers; a pin that a user would have saved, and never saw, counts as wrong",
    "features say nothing of a pin here; with content, the distance between the networks is another",
    "for one training of each network; the intervals are over users",
)


def measure(*, quick: bool = False, keep: Path = DATA / "pin_networks") -> Iterator[Raw]:
    """Run the benchmark; trained networks stay in `keep`. Raises BenchmarkError if the data is missing."""
    saves = Path(os.environ.get("PINTEREST_SAVES_DATA", DATA / "pinterest-saves"))
    if not (saves / "train.txt").is_file():
        raise BenchmarkError(
            f"{saves}/train.txt is missing; put the saves there, or name their folder in PINTEREST_SAVES_DATA"
        )
    known, held = ListEdges(saves / "train.txt"), ListEdges(saves / "test.txt")
    training = replace(TRAINING, epochs_max=1, batch=8_192) if quick else TRAINING
    with tempfile.TemporaryDirectory(prefix="pinrank-bench-") as temporary:
        folder = Path(temporary)
        graph = build_graph(graph_folder(folder / "neighbours"), known)
        walks = WalkSettings(walks=10 if quick else 200)
        neighbours = make_neighbours(folder / "neighbours", walks)
        joined = materialise(neighbours, [_features(graph.pin_ids)], folder / "neighbourhoods")
        asked = questions(known, held, contexts_max=500 if quick else None)
        raw: Raw = {"users": asked.contexts, "pins": len(asked.pin_ids), "cutoff": CUTOFF, "seed": SEED, "found": {}}
        ranks = {"popularity": ranked(asked, by_popularity(asked))}
        raw["found"]["popularity"] = _recalls(retrieval(asked, ranks["popularity"], by_popularity(asked), SEED))
        for name, sizes in NETWORKS.items():
            path = (folder if quick else keep) / f"{name.replace(', ', '-').replace(' ', '-')}.npz"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_network(path, train_producer("bench", joined, graph, walks, CO_SAVE, folder, sizes, training))
            scorer = by_vectors(asked, vectors_of(read_network(path), joined, graph)["co-save"])
            ranks[name] = ranked(asked, scorer)
            raw["found"][name] = _recalls(retrieval(asked, ranks[name], scorer, SEED))
            raw["found"][name]["over"] = {
                other: _estimate(recall_difference(asked, ranks[name], theirs, CUTOFF, SEED))
                for other, theirs in ranks.items()
                if other != name
            }
            yield raw


def _features(pin_ids: np.ndarray) -> SavedVectors:
    numbers = np.random.default_rng(SEED).standard_normal((len(pin_ids), FEATURES)) / np.sqrt(FEATURES)
    space = EmbeddingSpace(name="random", version=1, dim=FEATURES)
    held = PinEmbeddings(np.asarray(pin_ids), numbers.astype(np.float16), space)
    return SavedVectors(held, VectorsOrigin(space=space, until_ms=None))


def _recalls(found: Any) -> dict[str, Any]:
    return {
        "recall": {str(cutoff): _estimate(one) for cutoff, one in found.recall.items()},
        "mrr": _estimate(found.mrr),
    }


def _estimate(found: Any) -> dict[str, float | None]:
    return {"value": found.value, "low": found.low, "high": found.high}


def conclude(raw: Raw) -> Conclusion:
    cutoff, found = str(raw["cutoff"]), raw["found"]
    lines = [f"| | recall@{cutoff}, 95% interval over users | recall@100 | MRR |", "|---|---|---|---|"]
    for name, one in found.items():
        at = one["recall"][cutoff]
        lines.append(
            f"| {name} | {at['value']:.4f} [{at['low']:.4f}, {at['high']:.4f}] | {one['recall']['100']['value']:.4f} | "
            f"{one['mrr']['value']:.4f} |"
        )
    claims: list[Claim] = []
    if "pooled" in found:
        over = found["pooled"]["over"]["khop"]
        claims.append(Claim("pooled over khop, recall", 100 * over["value"], 25.0, "%", "at_least"))
    if "transformer" in found:
        over = found["transformer"]["over"]["pooled"]
        claims.append(
            Claim("transformer over pooled, lower end of the interval", 100 * over["low"], 0.0, "%", "at_least")
        )
        best = max(one["recall"][cutoff]["value"] for one in found.values())
        claims.append(Claim("best network, recall", best, 0.12, "recall", "at_least"))
    lines += ["", *(f"- Not shown: {caveat}" for caveat in CAVEATS)]
    summary = {f"{name}: recall@{cutoff}": one["recall"][cutoff]["value"] for name, one in found.items()}
    return Conclusion(summary, tuple(claims), "\n".join(lines) + "\n")
