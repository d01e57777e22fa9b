"""Walks and the join on two workers of a local Ray cluster, against the files that one process writes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_client.groups import EmbeddingSpace
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.graph import parts
from ranker.embedding.graph.materialised import open_neighbourhoods, read_neighbourhoods
from ranker.embedding.graph.neighbours import make_neighbours, open_neighbours, read_neighbours
from ranker.embedding.graph.parts import Parts
from ranker.embedding.graph.walks import WalkSettings
from ranker.embedding.vector_file import VectorsOrigin, open_saved_vectors, write_vectors
from ranker.errors import SettingError
from tests.ranker.commands import run

# Ray's own code sets what it has deprecated.
pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'pinrank[ray]'"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PINS, PER_FILE = 3_000, 1_000
WALKS = ("--walks", "10", "--neighbours", "5")


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, log_to_driver=False, logging_level="CRITICAL")
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PINS_PER_FILE", PER_FILE)


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    pins = np.concatenate([np.arange(PINS), rng.integers(PINS, size=9_000)])
    path = tmp_path_factory.mktemp("edges") / "edges.parquet"
    pq.write_table(pa.table({"context_id": rng.integers(400, size=len(pins)), "pin_id": pins}), path)
    return path


def vectors(path: Path, dim: int, dtype: str, pins: np.ndarray) -> Path:
    space = EmbeddingSpace.model_validate(
        {"name": path.stem, "version": 1, "dim": dim, "dtype": dtype, "content": "a" * 16}
    )
    numbers = np.random.default_rng(dim).standard_normal((len(pins), dim)).astype(dtype)
    held = PinEmbeddings(pins.astype(np.uint64), numbers, space)
    write_vectors(path, held, VectorsOrigin(space=space, until_ms=7))
    return path


def contents(made: Parts) -> list[bytes]:
    return [path.read_bytes() for path in made.paths]


@pytest.fixture
def walked(edges: Path, tmp_path: Path) -> Path:
    assert run("embed", "walks", edges, "--out", tmp_path / "one", "--processes", "1", *WALKS)[0] == 0
    return tmp_path / "one"


def test_walks_on_ray_are_those_of_one_process_and_go_on_with_what_it_has_begun(
    edges: Path, walked: Path, tmp_path: Path
) -> None:
    expected = contents(open_neighbours(walked))
    code, output = run("embed", "walks", edges, "--out", tmp_path / "ray", "--on", "ray", *WALKS)
    assert code == 0, output
    found = open_neighbours(tmp_path / "ray")
    assert (len(found.paths), contents(found)) == (3, expected)
    assert found.content == open_neighbours(walked).content
    kept, *others = open_neighbours(walked).paths
    written = kept.stat().st_mtime_ns
    for path in others:
        path.unlink()
    code, output = run("embed", "walks", edges, "--out", walked, "--on", "ray", *WALKS)
    assert code == 0, output
    assert contents(open_neighbours(walked)) == expected
    assert kept.stat().st_mtime_ns == written
    assert {path.name for path in walked.iterdir()} == {
        "graph", "neighbours.json", *(f"neighbours-{first:010d}.parquet" for first in range(0, PINS, PER_FILE))
    }  # fmt: skip


def test_one_process_goes_on_with_what_ray_has_begun(edges: Path, walked: Path, tmp_path: Path) -> None:
    from ranker.embedding.graph.ray_cluster import cluster, on_workers

    expected = contents(open_neighbours(walked))
    for path in open_neighbours(walked).paths:
        path.unlink()
    settings = WalkSettings(walks=10, neighbours=5)

    def interrupt(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with cluster(walked), pytest.raises(KeyboardInterrupt):
        make_neighbours(walked, settings, progress=interrupt, engine=on_workers)
    begun = list(walked.glob("neighbours-*.parquet"))
    assert 1 <= len(begun) <= 3
    assert {path.read_bytes() for path in begun} <= set(expected)
    assert contents(make_neighbours(walked, settings)) == expected


def test_a_join_on_ray_gives_the_files_of_one_process(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ranker.embedding.graph import ray_join

    rng = np.random.default_rng(9)
    # Pins in no order. Some have vectors in both files of features, some in one or none, and of the last file of
    # neighbours no pin at all has any.
    neighbours = open_neighbours(walked)
    ((pins, _, found, _),) = read_neighbours(neighbours, neighbours.paths[2:])
    without = np.union1d(pins, found)
    some, others = (np.setdiff1d(rng.permutation(PINS + 500)[:count], without) for count in (3_000, 2_000))
    features = (
        "--features", vectors(tmp_path / "a.parquet", 4, "float16", rng.permutation(some)),
        "--features", vectors(tmp_path / "b.parquet", 3, "float32", rng.permutation(others)),
    )  # fmt: skip
    assert run("embed", "materialise", walked, *features, "--out", tmp_path / "one")[0] == 0
    expected = open_neighbourhoods(tmp_path / "one")
    monkeypatch.setattr(ray_join, "_FILES_AT_ONCE", 2)
    code, output = run("embed", "materialise", walked, *features, "--out", tmp_path / "ray", "--on", "ray")
    assert code == 0, output
    joined = open_neighbourhoods(tmp_path / "ray")
    assert (joined.content, joined.until_ms, len(joined.paths)) == (expected.content, None, 3)
    assert contents(joined) == contents(expected)
    read = list(read_neighbourhoods(joined))
    assert [one.features.any(axis=1).all() for one in read] == [False, False, False]
    assert [bool(one.features.any()) for one in read] == [True, True, False]


def test_an_error_of_a_worker_is_the_one_of_one_process(walked: Path, tmp_path: Path) -> None:
    twice = vectors(tmp_path / "twice.parquet", 3, "float16", np.array([5, 6, 7, 5]))
    table = pq.read_table(twice)
    pq.write_table(table, twice, row_group_size=2)  # so that no task reads both
    assert open_saved_vectors(twice).parts == 2
    made = ("embed", "materialise", walked, "--features", twice, "--out")
    code, expected = run(*made, tmp_path / "one")
    assert (code, f"{twice} has pin 5 more than once; keep one of its vectors" in expected) == (1, True)
    assert run(*made, tmp_path / "ray", "--on", "ray") == (1, expected)
    damaged = open_neighbours(walked).paths[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    code, output = run(*made, tmp_path / "damaged", "--on", "ray")
    assert (code, f"error: {damaged} cannot be read: " in output) == (1, True)
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["neighbourhoods.json"]


def test_an_error_that_is_a_bug_keeps_its_own_traceback() -> None:
    from ranker.embedding.graph.ray_cluster import TABLES, each, results, stage

    def broken(_table: pa.Table) -> pa.Table:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="in broken"):
        list(results(each([{"a": 1}]).map_batches(stage(broken), **TABLES)))


def test_machines_that_lack_this_version_or_the_files_are_named(tmp_path: Path) -> None:
    from ranker.embedding.graph.ray_cluster import _check_workers, cluster

    with pytest.raises(SettingError, match=r"has pinrank \S+, and this command is 0\.0\.0; install the same version"):
        _check_workers("0.0.0", tmp_path, [])
    nowhere = "cannot see .*/nowhere; put it on a file system that all machines share"
    with pytest.raises(SettingError, match=nowhere), cluster(tmp_path / "out", [tmp_path / "nowhere"]):
        raise AssertionError
    assert list((tmp_path / "out").iterdir()) == []


def test_processes_are_refused_as_the_cluster_has_its_own(edges: Path, tmp_path: Path) -> None:
    code, output = run("embed", "walks", edges, "--out", tmp_path, "--on", "ray", "--processes", "2")
    assert (code, "--on ray uses all cores of its cluster; leave out --processes" in output) == (1, True)
