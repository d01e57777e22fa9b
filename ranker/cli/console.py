"""Shared parts of the commands: dataset options, progress bars, and errors that explain the fix.

Modules that a serving install lacks are imported on use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from model_store.bundle.files import Bundle
    from model_store.registry.store import ModelStore
    from ranker.data.atomic.recbole import AtomicDataset
    from ranker.data.problems import Problem
    from ranker.embedding.vector_file import GivenVectors
    from ranker.progress import StepProgress

DataOption = Annotated[
    str,
    typer.Option(
        help="Folder of RecBole atomic files, or ml-1m for MovieLens-1M, which is downloaded on first use.",
        rich_help_panel="Data",
    ),
]
ActionsOption = Annotated[
    Path | None,
    typer.Option(
        "--actions",
        help="TOML file that maps interactions to actions. Default: actions.toml in the data folder; without it, "
        "ratings become saves, likes, hides and closeups.",
        rich_help_panel="Data",
    ),
]
#: Where there is no terminal, a step says this often how far it is.
_LINE_EVERY_S = 10.0
#: The argument of `pip install`, by the module that it provides.
_PACKAGES = {
    "pyarrow": "'pinrank[data]'",
    "torch": "'pinrank[train]'",
    "sklearn": "'pinrank[train]'",
    "scipy": "'pinrank[tune]'",
    "lightgbm": "'pinrank[baselines]'",
    "optuna": "'pinrank[tune]'",
    "tomlkit": "'pinrank[tune]'",
    "onnxscript": "'pinrank[train]'",
    "matplotlib": "'pinrank[train]'",
    "tensorboard": "'pinrank[tensorboard]'",
    "mlflow": "'pinrank[mlflow]'",
    "ray": "'pinrank[ray]'",
    # Required dependencies, but an install may have left them out.
    "openvino": "openvino",
    "onnx": "onnx",
}


def fail(message: str) -> NoReturn:
    Console(markup=False, emoji=False, stderr=True).print(
        Text.assemble(("error: ", "bold red"), message), soft_wrap=True
    )
    raise typer.Exit(1)


@contextmanager
def explained() -> Iterator[None]:
    """Report errors that the user can fix as one line, without a traceback."""
    from impressions.errors import LogError  # noqa: PLC0415
    from kernels.engine import UnavailableError  # noqa: PLC0415
    from model_store.bundle.files import BundleError  # noqa: PLC0415
    from model_store.registry.objects import ModelStoreError  # noqa: PLC0415
    from ranker.errors import RankerError  # noqa: PLC0415

    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in _PACKAGES:
            raise
        fail(f"this command needs {missing}, which is not installed: pip install {_PACKAGES[missing]}")
    except (RankerError, BundleError, LogError, ModelStoreError, UnavailableError, OSError) as error:
        fail(str(error))


def read_dataset(data: str, actions: Path | None, reporter: ConsoleReporter) -> AtomicDataset:
    """Read the dataset that `--data` and `--actions` name; download MovieLens-1M on first use."""
    from ranker.cache_folder import default_cache_dir  # noqa: PLC0415
    from ranker.data import movielens  # noqa: PLC0415
    from ranker.data.atomic.recbole import read_atomic  # noqa: PLC0415
    from ranker.data.schema import read_schema  # noqa: PLC0415

    schema = None if actions is None else read_schema(actions)
    folder = Path(data)
    if data == movielens.NAME and not folder.is_dir():
        reporter.note(movielens.LICENCE.strip())
        with reporter.step("MovieLens-1M"):
            folder = movielens.obtain(default_cache_dir())
    with reporter.step("reading data"):
        return read_atomic(folder, schema)


def read_given_vectors(path: Path) -> GivenVectors:
    """Read what `--pin-vectors` names: a file of vectors, or a network that makes them. Raises DatasetError."""
    if path.suffix != ".npz":
        from ranker.embedding.vector_file import read_vectors  # noqa: PLC0415

        return read_vectors(path)
    from ranker.embedding.pins.as_of import NetworkVectors  # noqa: PLC0415 - it needs PyTorch
    from ranker.embedding.pins.trained import read_network  # noqa: PLC0415

    return NetworkVectors.of(read_network(path))


def suspicious(dataset: AtomicDataset) -> tuple[Problem, ...]:
    """Return the problems of a dataset, including timestamps that lie in the future."""
    from feature_client.action_times import clock_ms  # noqa: PLC0415
    from ranker.data.inspection import problems_of  # noqa: PLC0415

    return problems_of(dataset, clock_ms())


def note_problems(dataset: AtomicDataset, reporter: ConsoleReporter) -> None:
    """Print the problems of a dataset before it is used."""
    for problem in suspicious(dataset):
        reporter.note(str(problem))


class ConsoleReporter:
    """Shows each step as a progress bar on a terminal, and as a line every ten seconds in a file or pipe."""

    def __init__(self, console: Console, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock_s = clock_s

    @contextmanager
    def step(self, what: str) -> Iterator[StepProgress]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        with Progress(*columns, console=self._console) as shown:
            task = shown.add_task(what, total=None, detail="")
            lines = None if self._console.is_terminal else _ProgressLines(what, self.note, self._clock_s)

            def progress(done: int, total: int, detail: str = "", /) -> None:
                if shown.tasks[0].total is None:
                    # Work done before this run, as when training resumes, must not count towards its speed.
                    shown.reset(task, total=total, completed=done)
                shown.update(task, completed=done, total=total, detail=detail)
                if lines is not None:
                    lines.told(done, total, detail)

            try:
                yield progress
            except BaseException:
                # A file or pipe gets the last state of a bar only; half a bar says no more than the error that follows.
                shown.live.transient = not self._console.is_terminal
                raise
            total = shown.tasks[0].total or 1
            # Training may stop early; show the finished step as complete.
            shown.update(task, completed=total, total=total)

    def note(self, message: str) -> None:
        # In a file, a line stays a line, whatever width a terminal would have.
        self._console.print(message, highlight=False, soft_wrap=not self._console.is_terminal)


class _ProgressLines:
    """Prints how far a step is, at most every ten seconds."""

    def __init__(self, what: str, say: Callable[[str], None], clock_s: Callable[[], float]) -> None:
        self._what, self._say, self._clock_s = what, say, clock_s
        self._first: int | None = None
        self._started_s = self._said_s = clock_s()

    def told(self, done: int, total: int, detail: str) -> None:
        now_s = self._clock_s()
        if self._first is None:
            # Work done before this run must not count towards its speed.
            self._first = done
        if now_s - self._said_s < _LINE_EVERY_S or done >= total:
            return
        self._said_s = now_s
        elapsed_s = now_s - self._started_s
        parts = [f"{self._what}: {done:,} of {total:,} in {elapsed_s:.0f} s"]
        if done > self._first:
            parts.append(f"about {elapsed_s * (total - done) / (done - self._first):.0f} s left")
        self._say(", ".join([*parts, detail] if detail else parts))


def read_version(store: ModelStore, text: str) -> Bundle:
    """Read the version that `--model` names, as NAME@VERSION or NAME@LABEL."""
    name, at, version = text.partition("@")
    if not (name and at and version):
        fail(f"--model {text}: write NAME@VERSION or NAME@LABEL, e.g. ml1m@stable")
    return store.read(name, int(version) if version.isdigit() else store.resolve(name, version))
