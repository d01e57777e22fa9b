"""The rows that the published rankers learn from and are judged on: those of our networks, with the pins' numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bench.rankers.inputs import Shape
from kernels.engine import FeatureBatch
from model_store.bundle.files import Bundle
from model_store.bundle.manifest import Manifest
from ranker.data.actions import ActionLog
from ranker.data.embeddings import embeddings_of
from ranker.data.inputs import RECENCY, SIMILARITIES
from ranker.data.requests import Part, Split
from ranker.training.examples import ExampleBuilder, Examples, Sampling, newest_and_held


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to learn from, rows that decide when to stop, rows of the test, and the sizes of a network for them."""

    learned: Examples
    held: Examples
    test: Examples
    shape: Shape

    @staticmethod
    def of(bundle: Bundle, log: ActionLog, train: Sampling, newest: Sampling, test: Sampling, seed: int) -> Rows:
        """Build the requests that a bundle of ours learned from and is evaluated on.

        Args:
            bundle: its groups, vectors and sequence are those of the rows.
            log: the history.
            train: sampling of the training requests.
            newest: sampling of the validation requests, of which every other one is learned from.
            test: sampling of the test requests.
            seed: seed of the bundle's training and of the evaluation.
        """
        inputs = tuple(tensor for tensor in bundle.manifest.inputs if tensor.name != SIMILARITIES.name)
        manifest = bundle.manifest.model_copy(update={"inputs": inputs})
        embeddings = embeddings_of(bundle)

        def built(part: Part, sampling: Sampling) -> Examples:
            return ExampleBuilder(log, embeddings, manifest, Split(), sampling, seed).build(part)

        newer, held = newest_and_held(built("validation", newest))
        learned, measured = Examples.concat([built("train", train), newer]), built("test", test)
        acted = sequence_pins(log, learned, manifest.sequence_length)
        known = np.unique(np.concatenate([learned.pins, acted[acted >= 0]]))
        learned, held, measured = (
            _numbered(rows, log, known, manifest.sequence_length) for rows in (learned, held, measured)
        )
        return Rows(learned, held, measured, _shape(manifest, learned, len(known)))


def sequence_pins(log: ActionLog, examples: Examples, length: int) -> np.ndarray:
    """Return int64[R, L], the pin of each action of the sequences, newest first; -1 past the end."""
    found = np.full((len(examples.users), length), -1)
    for request, (user, activity) in enumerate(zip(examples.users, examples.activity, strict=True)):
        stop = log.user_splits[user] + activity
        events = log.by_user[max(log.user_splits[user], stop - length) : stop][::-1]
        found[request, : len(events)] = log.pin[events]
    return found


def _numbered(examples: Examples, log: ActionLog, known: np.ndarray, length: int) -> Examples:
    # The last entry is for the -1 past the end.
    number = np.zeros(len(log.pin_ids) + 1, np.int64)
    number[known] = np.arange(1, len(known) + 1)
    request = dict(examples.batch.request)
    if RECENCY.name in request:  # numbers of the user, as any other for these networks
        request["user_scalars"] = np.concatenate([request["user_scalars"], request.pop(RECENCY.name)], axis=1)
    batch = FeatureBatch(
        {**request, "sequence_numbers": number[sequence_pins(log, examples, length)]},
        {**examples.batch.candidate, "pin_number": number[examples.pins]},
        examples.batch.row_splits,
    )
    return replace(examples, batch=batch)


def _shape(manifest: Manifest, learned: Examples, pins: int) -> Shape:
    assert manifest.sequence is not None  # noqa: S101 - the default variant reads one
    request, candidate = learned.batch.request, learned.batch.candidate
    return Shape(
        heads=len(manifest.heads),
        dim=candidate["pin_embedding"].shape[1],
        user_scalars=request["user_scalars"].shape[1],
        pin_scalars=candidate["pin_scalars"].shape[1],
        surfaces=len(manifest.surfaces),
        actions=len(manifest.sequence.actions),
        length=manifest.sequence_length,
        pins=pins,
    )
