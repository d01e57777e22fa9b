from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from ranker.embedding.graph import parts
from ranker.embedding.graph.graph import build_graph, open_graph
from ranker.embedding.graph.neighbours import graph_folder, make_neighbours, open_neighbours, read_neighbours
from ranker.embedding.graph.walks import WalkSettings, neighbours_of
from ranker.errors import DatasetError, SettingError
from tests.ranker.embedding.edges import EdgeList, random_edges

SETTINGS = WalkSettings(walks=3, neighbours=4, seed=2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_one_process_and_eight_make_the_same_files(tmp_path):
    edges = random_edges(5, 9_000, 70_000, 120_000)
    for name, processes in (("one", 1), ("eight", 8)):
        build_graph(graph_folder(tmp_path / name), edges)
        done = []
        make_neighbours(tmp_path / name, SETTINGS, processes, lambda *told, done=done: done.append(told))
        assert sorted(done) == done
        assert done[-1] == (70_000, 70_000)
    assert len(contents(tmp_path / "one")) == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "eight")


@pytest.fixture
def many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PINS_PER_FILE", 32)
    build_graph(graph_folder(tmp_path), random_edges(5, 30, 100, 300))
    return tmp_path


def test_a_run_that_was_interrupted_makes_the_files_that_are_missing(many_files):
    def interrupt(done, _total):
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_neighbours(many_files, SETTINGS, 1, interrupt)
    first = contents(many_files)
    assert len(first) == 2
    with pytest.raises(DatasetError, match="lacks 2 of 4 files of neighbours; run `pinrank embed walks` again"):
        open_neighbours(many_files)
    written = {path: path.stat().st_mtime_ns for path in many_files.glob("*.parquet")}
    done = []
    made = make_neighbours(many_files, SETTINGS, 1, lambda *told: done.append(told))
    assert done[0] == (64, 100)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert contents(many_files).items() > first.items()
    assert open_neighbours(many_files) == made


def test_files_are_read_as_they_were_walked(many_files):
    made = make_neighbours(many_files, SETTINGS)
    graph = open_graph(graph_folder(many_files))
    expected = neighbours_of(graph, np.arange(100), SETTINGS)
    read = list(read_neighbours(made))
    assert [len(pins) for pins, *_ in read] == [32, 32, 32, 4]
    assert np.array_equal(np.concatenate([pins for pins, *_ in read]), graph.pin_ids)
    assert np.array_equal(np.concatenate([np.diff(splits) for _, splits, *_ in read]), np.diff(expected.splits))
    assert np.array_equal(np.concatenate([found for *_, found, _ in read]), graph.pin_ids[expected.pins])
    assert np.array_equal(np.concatenate([weights for *_, weights in read]), expected.weights)


def test_neighbours_of_other_settings_or_edges_do_not_mix(many_files):
    made = make_neighbours(many_files, SETTINGS)
    with pytest.raises(SettingError, match="has neighbours of other settings or data"):
        make_neighbours(many_files, WalkSettings(walks=4, neighbours=4, seed=2))
    other = many_files / "other"
    build_graph(graph_folder(other), EdgeList([(1, 2), (1, 3)]))
    assert make_neighbours(other, SETTINGS).content != made.content


def test_a_folder_that_does_not_say_of_what_it_has_begun_is_not_gone_on_with(many_files):
    make_neighbours(many_files, SETTINGS)
    (many_files / "neighbours.json").write_text("{")
    with pytest.raises(SettingError, match="has neighbours of other settings or data"):
        make_neighbours(many_files, SETTINGS)


def test_a_folder_without_neighbours_or_with_damaged_ones_says_what_to_do(many_files):
    with pytest.raises(DatasetError, match="holds no neighbours .*; make them with `pinrank embed walks`"):
        open_neighbours(many_files)
    made = make_neighbours(many_files, SETTINGS)
    made.paths[1].write_bytes(made.paths[1].read_bytes()[:-9])
    with pytest.raises(DatasetError, match="cannot be read: .*; run `pinrank embed walks` again"):
        list(read_neighbours(made))


def test_what_a_killed_run_left_unfinished_is_removed(many_files):
    left = many_files / ".neighbours-0000000000.parquet.0123"
    left.write_bytes(b"half")
    make_neighbours(many_files, SETTINGS)
    assert not left.exists()


def test_a_file_that_cannot_be_completed_leaves_nothing(tmp_path):
    def tables():
        yield pa.table({"pin_id": [1]})
        raise DatasetError("damaged")

    with pytest.raises(DatasetError, match="damaged"):
        parts.write_part(tmp_path / "neighbours-0000000000.parquet", tables())
    assert list(tmp_path.iterdir()) == []
