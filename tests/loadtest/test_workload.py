from __future__ import annotations

import json

import numpy as np
import pytest

from loadtest.workload import Workload, WorkloadError, parse_candidates, read_ids
from pinrank.v1 import ranking_pb2


def workload(**changes: object) -> Workload:
    settings: dict[str, object] = {
        "user_ids": np.arange(1, 11, dtype=np.uint64),
        "pin_ids": np.arange(1, 101, dtype=np.uint64),
        "candidates": ((8, 1.0),),
    }
    return Workload(**(settings | changes))  # type: ignore[arg-type]


def parsed(made: Workload, count: int) -> list[ranking_pb2.RankRequest]:
    return [ranking_pb2.RankRequest.FromString(content) for content in made.requests(count)]


def test_same_seed_gives_the_same_bytes():
    assert list(workload(seed=5).requests(50)) == list(workload(seed=5).requests(50))
    assert list(workload(seed=5).requests(50)) != list(workload(seed=6).requests(50))


@pytest.mark.parametrize("popularity", [0.0, 0.8, 3.0])
@pytest.mark.parametrize("count", [1, 37, 100])
def test_candidates_are_distinct_known_pins(popularity, count):
    for request in parsed(workload(popularity=popularity, candidates=((count, 1.0),)), 20):
        assert len(set(request.pin_ids)) == len(request.pin_ids) == count
        assert set(request.pin_ids) <= set(range(1, 101))
        assert 1 <= request.user_id <= 10
        assert request.surface == "home"


def test_first_pin_follows_the_power_law():
    requests = parsed(workload(popularity=1.0, candidates=((3, 1.0),)), 20_000)
    firsts = np.bincount([request.pin_ids[0] for request in requests], minlength=101)[1:]
    expected = 1 / np.arange(1, 101)
    expected *= len(requests) / expected.sum()
    assert np.allclose(firsts[:5], expected[:5], atol=5 * np.sqrt(expected[0]))


def test_what_the_first_draws_leave_open_follows_the_weights_too():
    # Nearly all weight on one pin: the second candidate always comes from the rest, where weights are 2**-p to 4**-p.
    made = workload(pin_ids=np.arange(1, 5, dtype=np.uint64), popularity=12.0, candidates=((2, 1.0),))
    seconds = np.bincount([request.pin_ids[1] for request in parsed(made, 4_000)], minlength=5)
    expected = np.array([2.0**-12, 3.0**-12, 4.0**-12])
    expected *= 4_000 / expected.sum()
    assert np.allclose(seconds[2:], expected, atol=5 * np.sqrt(expected.max() * 0.02))


def test_numbers_of_candidates_follow_their_weights():
    requests = parsed(workload(candidates=((2, 3.0), (50, 1.0))), 4_000)
    short = sum(len(request.pin_ids) == 2 for request in requests)
    assert {len(request.pin_ids) for request in requests} == {2, 50}
    assert short == pytest.approx(3_000, abs=150)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"user_ids": np.empty(0, np.uint64)}, "at least one user"),
        ({"pin_ids": np.array([1, 1], np.uint64), "candidates": ((1, 1.0),)}, "repeat"),
        ({"candidates": ((101, 1.0),)}, "101 candidates per request from 100 pins"),
        ({"candidates": ((0, 1.0),)}, "0 candidates"),
        ({"candidates": ((5, 0.0),)}, "weight above 0"),
        ({"candidates": ((5, float("nan")),)}, "weight above 0"),
        ({"candidates": ((5, float("inf")),)}, "weight above 0"),
        ({"popularity": float("nan")}, "the popularity must be a finite number of at least 0, but is nan"),
        ({"user_popularity": -1.0}, "the user popularity must be a finite number of at least 0, but is -1"),
        ({"top_k": -1}, "top_k must be at least 0 and at most 4,294,967,295, but is -1"),
        ({"seed": -1}, "the seed must be at least 0, but is -1"),
    ],
)
def test_impossible_workloads_are_refused(changes, says):
    with pytest.raises(WorkloadError, match=says):
        workload(**changes)


def test_ids_come_from_ranges_and_files(tmp_path):
    ids = np.array([5, 3, 2**63], np.uint64)
    np.save(tmp_path / "ids.npy", ids)
    np.savez(tmp_path / "many.npz", pin_ids=ids, vectors=np.zeros((3, 2)))
    np.savez(tmp_path / "one.npz", anything=ids)
    (tmp_path / "ids.json").write_text(json.dumps([5, 3, 2**63]))
    assert read_ids("7-9", "pin_ids").tolist() == [7, 8, 9]
    for name in ("ids.npy", "many.npz", "one.npz", "ids.json"):
        assert read_ids(str(tmp_path / name), "pin_ids").tolist() == ids.tolist(), name


@pytest.mark.parametrize("content", ["[]", "[-1]", "[1.5]", "[[1]]", '["a"]', "{", "7"])
def test_files_without_ids_are_refused(tmp_path, content):
    path = tmp_path / "ids.json"
    path.write_text(content)
    with pytest.raises(WorkloadError, match=r"ids\.json"):
        read_ids(str(path), "pin_ids")


@pytest.mark.parametrize("source", ["9-7", "0-999999999999", "nowhere.json", "1-", "nowhere.npz"])
def test_bad_sources_are_refused(source):
    with pytest.raises(WorkloadError, match=source):
        read_ids(source, "pin_ids")


def test_archive_without_the_array_names_what_it_holds(tmp_path):
    np.savez(tmp_path / "two.npz", a=[1], b=[2])
    with pytest.raises(WorkloadError, match=r"\['a', 'b'\]"):
        read_ids(str(tmp_path / "two.npz"), "pin_ids")


def test_candidates_are_a_number_or_a_distribution():
    assert parse_candidates("128") == ((128, 1.0),)
    assert parse_candidates("32:5,128:0.5") == ((32, 5.0), (128, 0.5))
    with pytest.raises(WorkloadError, match="COUNT:WEIGHT"):
        parse_candidates("many")
