from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranker.data.actions import action_log
from ranker.data.atomic.recbole import read_atomic
from ranker.embedding.graph import graph as graphs
from ranker.embedding.graph.edges import ListEdges, LogEdges, ParquetEdges
from ranker.embedding.graph.graph import build_graph, open_graph
from ranker.errors import DatasetError
from tests.ranker.embedding.edges import EdgeList
from tests.ranker.interactions import write_atomic

IDS = st.sampled_from([0, 1, 2, 7, 2**40, 2**64 - 1])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(edges=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=30), per_batch=st.integers(1, 7))
def test_a_graph_has_the_edges_of_both_sides_in_their_order(tmp_path_factory, monkeypatch, edges, per_batch):
    monkeypatch.setattr(graphs, "_IDS_MERGED", 3)
    graph = build_graph(tmp_path_factory.mktemp("graph"), EdgeList(edges, per_batch))
    contexts, pins = (sorted({edge[side] for edge in edges}) for side in (0, 1))
    assert graph.pin_ids.tolist() == pins
    for side, own, others, own_side in ((graph.pins, pins, contexts, 1), (graph.contexts, contexts, pins, 0)):
        for position, node in enumerate(own):
            held = side.others[side.starts[position] : side.starts[position + 1]]
            assert [others[i] for i in held] == [e[1 - own_side] for e in edges if e[own_side] == node]


def test_a_graph_is_used_again_for_the_same_edges_only(tmp_path):
    first = build_graph(tmp_path, EdgeList([(1, 2), (1, 3)], until_ms=9))
    written = (tmp_path / "pins_others.npy").stat().st_mtime_ns
    again = build_graph(tmp_path, EdgeList([(1, 2), (1, 3)], per_batch=1, until_ms=9))
    assert (again.content, again.until_ms, again.edges) == (first.content, 9, 2)
    assert (tmp_path / "pins_others.npy").stat().st_mtime_ns == written
    with pytest.raises(DatasetError, match=r"holds the graph of other edges; choose another folder"):
        build_graph(tmp_path, EdgeList([(1, 2), (1, 4)]))


def test_a_graph_that_is_not_complete_is_built_again_and_not_read(tmp_path):
    whole = build_graph(tmp_path, EdgeList([(1, 2), (1, 3)]))
    (tmp_path / "graph.json").unlink()
    with pytest.raises(DatasetError, match="holds no complete graph"):
        open_graph(tmp_path)
    assert build_graph(tmp_path, EdgeList([(1, 2), (1, 3)])).content == whole.content
    (tmp_path / "pins_others.npy").write_bytes(b"")
    with pytest.raises(DatasetError, match="holds no complete graph"):
        open_graph(tmp_path)


def test_no_edge_is_no_graph(tmp_path):
    with pytest.raises(DatasetError, match="there is no edge"):
        build_graph(tmp_path, EdgeList([]))


def all_edges(source):
    contexts, pins = zip(*source.batches(), strict=True)
    return list(zip(np.concatenate(contexts).tolist(), np.concatenate(pins).tolist(), strict=True))


def test_a_log_gives_what_users_liked_before_the_end_of_the_window(tmp_path):
    log = action_log(read_atomic(write_atomic(tmp_path)))
    liked = np.flatnonzero(log.schema.affinities[log.action] > 0)
    until_ms = int(log.time_ms[liked[200]])
    expected = [
        (int(log.user_ids[log.user[i]]), int(log.pin_ids[log.pin[i]]))
        for i in range(len(log.time_ms))
        if log.time_ms[i] < until_ms and log.schema.affinities[log.action[i]] > 0
    ]
    assert 150 < len(expected) <= 200
    assert all_edges(LogEdges(log, until_ms)) == expected
    assert len(all_edges(LogEdges(log, until_ms + 1))) > len(expected)


def test_edges_come_from_parquet_and_from_lists(tmp_path):
    path = tmp_path / "edges.parquet"
    pq.write_table(pa.table({"pin_id": [3, 4], "context_id": [1, 2], "other": ["a", "b"]}), path)
    assert all_edges(ParquetEdges(path)) == [(1, 3), (2, 4)]
    lists = tmp_path / "lists.txt"
    lists.write_text("1 3 4\n2\n18446744073709551615 5\n")
    assert all_edges(ListEdges(lists)) == [(1, 3), (1, 4), (2**64 - 1, 5)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pin_id": [1]}, "lacks the column context_id"),
        ({"pin_id": [1], "context_id": ["board"]}, "column context_id: holds string; the field needs numbers"),
        ({"pin_id": [1], "context_id": [-1]}, "column context_id: -1 is negative"),
        ({"pin_id": [1, None], "context_id": [1, 2]}, "column pin_id: "),
    ],
)
def test_parquet_edges_that_are_malformed_say_why(tmp_path, columns, message):
    path = tmp_path / "edges.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DatasetError, match=message):
        all_edges(ParquetEdges(path))


def test_files_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "edges.parquet").write_text("no parquet")
    with pytest.raises(DatasetError, match="cannot be read as a Parquet file"):
        all_edges(ParquetEdges(tmp_path / "edges.parquet"))
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        all_edges(ListEdges(tmp_path / "none.txt"))


@pytest.mark.parametrize("line", ["1 two", "1 -2", "", "1 18446744073709551616", "1.5 2"])
def test_a_malformed_list_is_named_by_its_line(tmp_path, line):
    (tmp_path / "lists.txt").write_text(f"1 2\n{line}\n3 4\n")
    with pytest.raises(DatasetError, match=r"lists\.txt, line 2: expected whole numbers"):
        all_edges(ListEdges(tmp_path / "lists.txt"))
