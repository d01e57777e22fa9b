from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model_store.bundle.files import EMBEDDINGS, Bundle
from model_store.model.utility import load_utility
from ranker.data.actions import ActionLog, action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.data.embeddings import svd_embeddings
from ranker.data.features import SURFACES
from ranker.data.requests import Split, producer_until_ms
from ranker.evaluation.scoring import families
from ranker.training.examples import ExampleBuilder, Examples, Sampling, utilities_of
from tests.ranker.interactions import write_atomic
from tests.ranker.scored import manifest

SPLIT = Split(test_slices=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ActionLog:
    return action_log(read_atomic(write_atomic(tmp_path_factory.mktemp("data"))))


def examples(log: ActionLog, attributes: tuple[str, ...] = ()) -> Examples:
    embeddings = svd_embeddings(log, producer_until_ms(log, SPLIT), seed=1, name="toy")
    builder = ExampleBuilder(log, embeddings, manifest(), SPLIT, Sampling(candidates=20), seed=5)
    return builder.build("test", attributes=attributes)


def bundle(*, sequence: bool = True, embeddings: bytes = b"some") -> Bundle:
    return Bundle(manifest(sequence=sequence), b"", "", {EMBEDDINGS: embeddings})


def test_each_surface_is_ranked_by_its_own_utility_with_the_pins_attributes(log: ActionLog) -> None:
    table = load_utility(
        b"""
        [surfaces.home]
        weights = { pinner = 2.0 }
        utilities = { pinner = "save - hide" }
        [surfaces.related]
        weights = { pinner = 1.0, creator = 0.5 }
        utilities = { pinner = "save", creator = "pin.log_actions + pin.creator_tail" }
        """,
        manifest(),
    )
    built = examples(log, ("creator_tail", "log_actions"))
    # What is kept beside the tensors is what the tensors were made from.
    np.testing.assert_array_equal(built.attributes["log_actions"], built.batch.candidate["pin_scalars"][:, 0])
    probabilities = np.random.default_rng(1).random((built.batch.rows, 3)).astype(np.float32)
    save, hide = probabilities[:, 0], probabilities[:, 1]
    related = np.repeat(built.batch.request["surface"] == SURFACES.index("related"), np.diff(built.batch.row_splits))
    assert 0 < related.mean() < 1
    creator = built.attributes["log_actions"] + built.attributes["creator_tail"]
    expected = np.where(related, save + 0.5 * creator, 2 * (save - hide))
    np.testing.assert_allclose(utilities_of(table, built, probabilities), expected, rtol=1e-5)


def test_examples_say_who_asked_where_and_keep_it_through_take(log: ActionLog) -> None:
    built = examples(log, ("ad",))
    np.testing.assert_array_equal(built.surfaces, built.batch.request["surface"])
    some = built.take(np.array([3, 0]))
    np.testing.assert_array_equal(some.surfaces, built.surfaces[[3, 0]])
    start, stop = built.batch.row_splits[3:5]
    np.testing.assert_array_equal(some.attributes["ad"][: stop - start], built.attributes["ad"][start:stop])


def test_bundles_are_a_family_when_one_reads_all_that_the_others_read() -> None:
    found = families(
        {
            "base": bundle(sequence=False),
            "other embeddings": bundle(embeddings=b"others"),
            "early": bundle(),
            "late": bundle(),
        }
    )
    assert found == [["other embeddings"], ["early", "late", "base"]]
    short = replace(bundle(), manifest=manifest().model_copy(update={"sequence_length": 5}))
    assert families({"long": bundle(), "short": short}) == [["long"], ["short"]]
