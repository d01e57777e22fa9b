"""Training sees what serving would have seen: the same numbers, and nothing of what came later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import pytest
import torch

from feature_client.bulk.write import write_sequences
from feature_client.fetch import fetch
from feature_client.stores.memory_store import MemoryStore
from kernels.engine import FeatureBatch
from model_store.bundle.tensor_sources import RECENCY_NAMES, similarity_count
from model_store.model.assembly import Assembler
from ranker.data.actions import ActionLog, ActionRule, ActionSchema, action_log, strongest_action
from ranker.data.embeddings import PinEmbeddings, space_of, svd_embeddings
from ranker.data.features import SURFACES, Groups, events_of, fill_store, scalar_names
from ranker.data.inputs import SEQUENCE_LENGTH
from ranker.data.requests import Part, Request, Slice, Split, part_slices, producer_until_ms, slice_requests
from ranker.export.manifest import draft_manifest
from ranker.network.model import NetworkConfig, RankerNetwork
from ranker.training.examples import ExampleBuilder, FeatureSnapshot, Sampling
from ranker.training.minibatches import tensors
from tests.ranker.data.test_actions import dataset_of

SCHEMA = ActionSchema(
    actions=(
        ActionRule(name="playlist_add", meaning="kept", column="rating", at_least=5, affinity=1.0),
        ActionRule(name="skip", meaning="skipped", column="rating", at_most=1, affinity=0.0),
        ActionRule(name="repeat", meaning="again", column="rating", at_least=4, affinity=0.6),
        ActionRule(name="listen", meaning="played", affinity=0.2, head=False),
    )
)
MANIFEST = draft_manifest(
    "songs", space_of("songs"), SCHEMA, SCHEMA.heads, sequence_length=100, similarities=True, recency=True, interests=3
)
SPLIT = Split(train_slices=2, validation_slices=1, test_slices=2)
GROUPS = Groups.served_by(MANIFEST)


@pytest.fixture(scope="module")
def log() -> ActionLog:
    """One user far more active than thirty others; pins and users that turn up late; many events at one time."""
    rng = np.random.default_rng(8)
    events = []
    for step in range(4_000):
        someone, newcomer = int(rng.integers(100, 110 + step // 200)), 1_000 + step // 100
        user = int(rng.choice([7, someone, newcomer], p=[0.2, 0.7, 0.1]))
        pin = int(rng.integers(1, 60 + step // 20))
        events.append((user, pin, int(rng.integers(1, 6)), 1_000 * (step // 3)))
    return action_log(dataset_of(events, SCHEMA))


@pytest.fixture(scope="module")
def embeddings(log: ActionLog) -> PinEmbeddings:
    return svd_embeddings(log, producer_until_ms(log, SPLIT), seed=1, name="toy")


@pytest.fixture(scope="module")
def network() -> RankerNetwork:
    torch.manual_seed(3)
    sizes = NetworkConfig(
        heads=len(SCHEMA.heads),
        actions=len(SCHEMA.actions),
        surfaces=len(SURFACES),
        scalars=len(scalar_names(SCHEMA)),
        similarities=similarity_count(100, len(SCHEMA.actions)),
        recency=len(RECENCY_NAMES),
        interests=3,
    )
    return RankerNetwork(sizes).eval()


def builder_of(log: ActionLog, embeddings: PinEmbeddings) -> ExampleBuilder:
    return ExampleBuilder(log, embeddings, MANIFEST, SPLIT, Sampling(), seed=5)


def chosen_requests(log: ActionLog) -> Iterator[tuple[Slice, Request]]:
    """Choose every ninth request of all parts."""
    parts: tuple[Part, ...] = ("train", "validation", "test")
    for part in parts:
        for span in part_slices(log, SPLIT, part):
            requests = slice_requests(log, span, SEQUENCE_LENGTH, np.random.default_rng(span.number))
            yield from ((span, request) for request in requests[::9])


def offline(
    log: ActionLog, embeddings: PinEmbeddings, span: Slice, request: Request, candidates: np.ndarray
) -> FeatureBatch:
    """Build a request's tensors the way training does."""
    snapshot = FeatureSnapshot.at(span, log, GROUPS, embeddings.of(log.pin_ids), [0])
    fetched = builder_of(log, embeddings).fetched(request, candidates, snapshot.pins, snapshot.users)
    return Assembler(MANIFEST).assemble(fetched, request.surface)


def assert_same(ours: FeatureBatch, theirs: FeatureBatch) -> None:
    for side in ("request", "candidate"):
        named, others = getattr(ours, side), getattr(theirs, side)
        assert named.keys() == others.keys()
        for name, tensor in named.items():
            assert tensor.dtype == others[name].dtype
            np.testing.assert_array_equal(tensor, others[name], err_msg=name)
    np.testing.assert_array_equal(ours.row_splits, theirs.row_splits)


async def test_logged_requests_replayed_through_store_and_fetch_give_the_tensors_of_training(
    log: ActionLog, embeddings: PinEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, replayed = np.random.default_rng(2), []
    assert GROUPS.sequence is not None
    for span, group in groupby(chosen_requests(log), key=lambda chosen: chosen[0]):
        store = MemoryStore()
        await fill_store(store, log, embeddings, GROUPS, before_ms=span.start_ms)
        for _, request in group:
            # The sequence is live; rows are as of the slice.
            own = log.by_user[log.user_splits[request.user] : log.user_splits[request.user + 1]]
            earlier = own[log.time_ms[own] < request.time_ms]
            user_id = log.user_ids[[request.user]]
            if len(earlier):
                events = events_of(log, earlier, GROUPS.sequence)
                await write_sequences(store, GROUPS.sequence, user_id, events, np.array([0, len(events)]))
            candidates = np.unique(np.concatenate([log.pin[request.chosen], rng.integers(len(log.pin_ids), size=30)]))
            candidates = rng.permutation(candidates)
            query = None if request.query_pin is None else int(log.pin_ids[request.query_pin])
            monkeypatch.setattr("feature_client.fetch.clock_ms", partial(int, request.time_ms))
            fetched = await fetch(store, MANIFEST.needs, int(user_id[0]), log.pin_ids[candidates], query)
            served = Assembler(MANIFEST).assemble(fetched, request.surface)
            assert_same(served, offline(log, embeddings, span, request, candidates))
            missing, interests = fetched.missing(), np.count_nonzero(served.request["interest_importances"])
            replayed.append((request.surface, len(request.history), missing.candidates, missing.user, interests))
    surfaces, histories, pins_missing, users_missing, interests_held = map(set, zip(*replayed, strict=True))
    # The replay reached every path: both surfaces, full and short sequences, unknown pins and users, no interests and
    # all of them.
    assert surfaces == {"home", "related"}
    assert max(histories) == SEQUENCE_LENGTH
    assert min(histories) < 20
    assert max(pins_missing) > 0
    assert users_missing == {True, False}
    assert interests_held == {0, 3}


def with_other_future(log: ActionLog, from_ms: int) -> ActionLog:
    """Give every event from a time on, whoever's it is, another pin and other labels."""
    rng = np.random.default_rng(9)
    first = log.before(from_ms)
    count = len(log.pin) - first
    pin, labels = log.pin.copy(), log.labels.copy()
    pin[first:] = rng.integers(len(log.pin_ids), size=count)
    labels[first:] = SCHEMA.labels({"rating": rng.integers(1, 6, count).astype(np.float32)}, count)
    return replace(log, pin=pin, labels=labels, action=strongest_action(labels))


def request_at(log: ActionLog, span: Slice, user: int, time_ms: int) -> Request:
    requests = slice_requests(log, span, SEQUENCE_LENGTH, np.random.default_rng(span.number))
    return next(r for r in requests if (r.user, r.time_ms) == (user, time_ms))


def test_nothing_at_or_after_a_request_moves_its_tensors_its_scores_or_the_embeddings(
    log: ActionLog, embeddings: PinEmbeddings, network: RankerNetwork
) -> None:
    candidates = np.random.default_rng(1).choice(len(log.pin_ids), 20, replace=False)
    surfaces = set()
    for span, request in list(chosen_requests(log))[::3]:
        changed = with_other_future(log, request.time_ms)
        again = request_at(changed, span, request.user, request.time_ms)
        assert not np.array_equal(changed.pin[again.chosen], log.pin[request.chosen])
        assert (again.query_pin, again.activity) == (request.query_pin, request.activity)
        refitted = svd_embeddings(changed, producer_until_ms(changed, SPLIT), seed=1, name="toy")
        np.testing.assert_array_equal(refitted.of(log.pin_ids), embeddings.of(log.pin_ids))
        before = offline(log, embeddings, span, request, candidates)
        after = offline(changed, refitted, span, again, candidates)
        assert_same(before, after)
        with torch.inference_mode():
            np.testing.assert_array_equal(network(**tensors(before)).numpy(), network(**tensors(after)).numpy())
        surfaces.add(request.surface)
    assert surfaces == {"home", "related"}


def test_what_came_just_before_a_request_does_move_its_scores(
    log: ActionLog, embeddings: PinEmbeddings, network: RankerNetwork
) -> None:
    """The test above could not see a leak if nothing ever moved a score."""
    candidates = np.random.default_rng(1).choice(len(log.pin_ids), 20, replace=False)
    span, request = next(chosen for chosen in chosen_requests(log) if len(chosen[1].history) > 1)
    changed = with_other_future(log, int(log.time_ms[request.history[0]]))
    history = replace(request, query_pin=None)
    before = offline(log, embeddings, span, history, candidates)
    after = offline(changed, embeddings, span, history, candidates)
    with torch.inference_mode():
        assert not np.array_equal(network(**tensors(before)).numpy(), network(**tensors(after)).numpy())
