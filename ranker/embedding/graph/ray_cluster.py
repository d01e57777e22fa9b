"""The workers of a Ray cluster, as another engine for the walks.

Every worker reads the graph's memory maps, and writes its files, under the same paths: they stand on a file system that
all machines of the cluster share.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ranker.errors import RankerError, SettingError

_ADDRESS = "RAY_ADDRESS"
_PACKAGE = "pinrank"
#: How long a cluster may take to accept a connection.
_CONNECT_S = 10.0


class TaskError(Exception):
    """An error that the user can fix, on its way back from a worker: Ray adds words to the message of what it carries.

    Attributes:
        error: the error as it was raised.
    """

    def __init__(self, error: RankerError | OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def cluster(folder: Path, reads: Sequence[Path] = ()) -> Iterator[None]:
    """Use the cluster that RAY_ADDRESS names, or start one of this machine's cores until the end of the block.

    Args:
        folder: where the workers will write; it is made if there is none.
        reads: what else they will read.

    Raises:
        SettingError: the cluster does not answer, or a machine of it lacks this version of pinrank or one of the paths.
    """
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        _connect()
    try:
        _check_workers(metadata.version(_PACKAGE), folder, reads)
        # This command shows its own progress and errors. Ray's own words stay in the files of its session.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True
        yield
    finally:
        if ours:
            ray.shutdown()


def on_workers(write: Callable[[Path, int, int], Path], files: Mapping[Path, tuple[int, int]]) -> Iterator[Path]:
    """Write each file in a task of the cluster that is connected, and yield those that are complete: an `Engine`."""
    tasks = [{"path": str(path), "first": first, "stop": stop} for path, (first, stop) in files.items()]
    for row in results(each(tasks).map_batches(stage(_write, write), **TABLES)):
        yield Path(row["path"])


def _write(tasks: pa.Table, write: Callable[[Path, int, int], Path]) -> pa.Table:
    for task in tasks.to_pylist():
        write(Path(task["path"]), task["first"], task["stop"])
    return tasks.select(["path"])


#: So that a function of `map_batches` gets and returns the tables that Ray holds, whole.
TABLES: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None}


def each(tasks: Sequence[Mapping[str, object]]) -> ray.data.Dataset:
    """Return a dataset that holds each of some rows alone, so that each is a task."""
    return ray.data.from_items(list(tasks), override_num_blocks=max(1, len(tasks)))


def stage(work: Callable[..., pa.Table], *settings: object) -> Callable[[pa.Table], pa.Table]:
    """Return a function of one table, as Ray calls it, whose errors `results` raises as they are."""

    def run(table: pa.Table) -> pa.Table:
        try:
            return work(table, *settings)
        except (RankerError, OSError) as error:
            raise TaskError(error) from error

    return run


def results(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset as they become ready. Raises the errors of its stages as they were raised there."""
    try:
        yield from dataset.iter_rows()
    except RayTaskError as error:
        if isinstance(error.cause, TaskError):
            raise error.cause.error from None
        raise


def _connect() -> None:
    address = os.environ.get(_ADDRESS)
    try:
        if address:
            host, _, port = address.rpartition("://")[2].rpartition(":")
            if host:  # Ray itself would ask for many minutes whether anybody is there
                socket.create_connection((host, int(port)), _CONNECT_S).close()
        # Without an address, Ray would join whatever cluster runs on this machine.
        ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError) as error:
        if not address:
            raise SettingError(f"Ray cannot be started on this machine: {error}") from error
        raise SettingError(
            f"the Ray cluster at {_ADDRESS}={address} cannot be reached: {error}; start it with `ray start`, or unset "
            f"{_ADDRESS} for one on this machine"
        ) from error


def _check_workers(own: str, folder: Path, reads: Sequence[Path]) -> None:
    """Ask each machine that would work for its version and for the paths, with functions that need nothing of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of the same name on another disk lacks this file.
    shared = folder / f".seen-{uuid4().hex}"
    shared.touch()
    try:
        asked = [
            (node["NodeManagerHostname"], _asked(node["NodeID"], [shared, *reads]))
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        ]
        for name, (version, seen) in asked:
            _check_worker(name, own, version, dict(zip([folder, *reads], seen, strict=True)))
    finally:
        shared.unlink()


def _asked(node_id: str, paths: Sequence[Path]) -> tuple[Any, list[Any]]:
    """Return references to the answers of a machine: its version of pinrank, and whether it has each path."""
    here = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    version = ray.remote(metadata.version).options(**here).remote(_PACKAGE)
    return version, [ray.remote(os.path.exists).options(**here).remote(str(path)) for path in paths]


def _check_worker(name: str, own: str, version: Any, seen: Mapping[Path, Any]) -> None:
    try:
        has = f"pinrank {ray.get(version)}"
    except metadata.PackageNotFoundError:
        has = "no pinrank"
    if has != f"pinrank {own}":
        raise SettingError(
            f"{name}, a machine of the Ray cluster, has {has}, and this command is {own}; install the same version on "
            "all machines: pip install 'pinrank[ray]'"
        )
    for path, there in seen.items():
        if not ray.get(there):
            raise SettingError(
                f"{name}, a machine of the Ray cluster, cannot see {path}; put it on a file system that all machines "
                "share"
            )
