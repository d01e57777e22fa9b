"""Prepares the demo: downloads or reads a dataset, trains a ranker if there is none, and fills a feature store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from feature_client.groups import SequenceGroup
from feature_client.stores.lmdb_store import EmbeddedStore
from model_store.bundle.files import Bundle
from model_store.registry.store import open_model_store
from ranker.cache_folder import default_cache_dir
from ranker.data.actions import ActionLog, action_log
from ranker.data.atomic.recbole import AtomicDataset, read_atomic
from ranker.data.embeddings import embeddings_of
from ranker.data.features import Groups, fill_store
from ranker.data.movielens import LICENCE, obtain
from ranker.data.schema import RATINGS, ActionSchema
from ranker.embedding.users.carried import encoders_in
from server.cli.console import console as open_console

HERE = Path(__file__).parent
PINRANK = str(Path(sys.executable).with_name("pinrank"))
CATALOGUE, UTILITY = "catalogue.json", "utility.toml"
USERS_SHOWN, CANDIDATES = 3, 128
#: The model name of rankers that the demo trains.
TRAINED = "demo"

console = open_console()


class DemoError(Exception):
    """The demo cannot continue; the message says why."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where the demo keeps its model, features and catalogue. The repository holds nothing of the dataset."""

    models: Path
    bundle: Bundle
    folder: Path

    @property
    def store_url(self) -> str:
        return f"lmdb://{self.folder / 'features'}"

    @property
    def sequence(self) -> SequenceGroup:
        if (group := self.bundle.manifest.sequence) is None:
            raise DemoError(f"{self.bundle.manifest.ref} reads no actions, but the demo needs a ranker that does")
        return group

    def catalogue(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / CATALOGUE).read_text())
        return content

    @property
    def of_ratings(self) -> bool:
        """Whether the heads are those of ratings, for which the demo has a utility table."""
        return {head.name for head in self.bundle.manifest.heads} == set(RATINGS.heads)


def prepared(data: Path | None, train_options: Sequence[str] = ()) -> Home:
    """Prepare the data, a ranker and a feature store; later runs reuse all of them.

    Raises:
        DemoError, DatasetError, ObtainError, ModelStoreError, BundleError: a part cannot be prepared; the message says
            what is missing and what to do.
    """
    cache = default_cache_dir()
    if data is None:
        if not (cache / "ml-1m").is_dir():
            with steps("downloading MovieLens-1M"):
                obtain(cache)
        console.print(Panel(LICENCE.strip(), title="licence of the data", border_style="yellow"))
        data, name, models, model = cache / "ml-1m", "ml-1m", HERE / "models", "ml1m"
    else:
        data = data.resolve()
        # The name depends on the content, because other interactions need another ranker.
        name = f"{data.name}-{content_digest(data)}"
        models, model = cache / "demo" / f"{name}-models", TRAINED
        if "stable" not in open_model_store(models).labels(model):
            train(data, models, train_options)
    store = open_model_store(models)
    bundle = store.read(model, store.resolve(model, "stable"))
    # The stored features depend on the bundle and on the layout of its sequence.
    layout = bundle.manifest.sequence.fingerprint.hex()[:6] if bundle.manifest.sequence else "none"
    home = Home(models, bundle, cache / "demo" / f"{name}-{bundle.digest[:12]}-{layout}")
    if not home.folder.exists():
        fill(home, data)
    return home


def content_digest(data: Path) -> str:
    """Return a digest of a dataset's files, as 12 hexadecimal digits."""
    files = sorted(path for path in data.glob("*") if path.suffix in {".inter", ".item", ".toml"})
    if not any(path.suffix == ".inter" for path in files):
        raise DemoError(f"{data} has no RecBole atomic files; it needs a NAME.inter")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def train(data: Path, models: Path, options: Sequence[str]) -> None:
    """Train a ranker for a dataset, and label it `stable`."""
    with steps("reading the data"):
        log = action_log(read_atomic(data))
    console.print(
        f"{data} has no ranker yet, so the demo is training one (this needs the extra `train`)", soft_wrap=True
    )
    models.mkdir(parents=True, exist_ok=True)
    if (utility := data / UTILITY).exists():
        console.print(f"using the utility table {utility}", soft_wrap=True)
    elif set(log.heads) == set(RATINGS.heads):
        utility = HERE / UTILITY
    else:
        utility = models / UTILITY
        utility.write_text(utility_by_affinity(log.schema, log.heads))
        console.print(
            f"wrote a utility table that weighs actions by their affinity: {utility}; to use your own weights, put a "
            f"{UTILITY} beside the data (docs/train-your-own.md)",
            soft_wrap=True,
        )
    command = [PINRANK, "train", "--force", "--data", str(data), "--name", TRAINED, "--utility", str(utility)]
    if subprocess.run([*command, "--store", str(models), "--label", "stable", *options], check=False).returncode:
        raise DemoError("training failed; the message above says why")


def utility_by_affinity(schema: ActionSchema, heads: Sequence[str]) -> str:
    """Return a utility table (TOML) that weighs each action by its affinity; the first head if all are 0."""
    affinities = {name: float(affinity) for name, affinity in zip(schema.names, schema.affinities, strict=True)}
    terms = [f"{affinities[head]:g} * {head}" for head in heads if affinities[head]] or list(heads[:1])
    surfaces = [
        f"[surfaces.{surface}]\nweights = {{ pinner = 1.0 }}\n[surfaces.{surface}.utilities]\n"
        f'pinner = "{" + ".join(terms)}"\n'
        for surface in ("home", "related")
    ]
    return "# Written by the demo: each action's weight is its affinity in actions.toml.\n\n" + "\n".join(surfaces)


def fill(home: Home, data: Path) -> None:
    """Fill the feature store and write the catalogue; the folder appears complete or not at all."""
    home.folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        steps("reading the ratings") as progress,
        tempfile.TemporaryDirectory(prefix=".filling-", dir=home.folder.parent) as temporary,
    ):
        staging = Path(temporary) / "demo"
        staging.mkdir()
        dataset = read_atomic(data)
        log = action_log(dataset)
        bar = progress.add_task("filling the feature store", total=len(log.pin_ids) + 2 * len(log.user_ids))
        asyncio.run(_fill(staging / "features", log, home, lambda _, count: progress.advance(bar, count)))
        (staging / CATALOGUE).write_text(json.dumps(catalogue(dataset, log)))
        # For `pinrank load`: all users, and all pins with the most popular first.
        (staging / "users.json").write_text(json.dumps(log.user_ids.tolist()))
        pins, counts = np.unique(dataset.pins, return_counts=True)
        (staging / "pins.json").write_text(json.dumps(pins[np.argsort(-counts, kind="stable")].tolist()))
        staging.chmod(0o755)
        if not home.folder.exists():  # another process may have been faster
            staging.rename(home.folder)
    console.print(
        f"{len(log.user_ids):,} users, {len(log.pin_ids):,} pins, {len(dataset.users):,} actions: {home.store_url}",
        soft_wrap=True,
    )


async def _fill(path: Path, log: ActionLog, home: Home, progress: Callable[[str, int], None]) -> None:
    store = EmbeddedStore(path)
    await store.start()
    embeddings = embeddings_of(home.bundle)
    groups = Groups.served_by(home.bundle.manifest, encoders_in([home.bundle]))
    await fill_store(store, log, embeddings, groups, progress)
    await store.close()


def catalogue(dataset: AtomicDataset, log: ActionLog) -> dict[str, Any]:
    """Choose users with a history of average length, and draw unseen candidates for each, by popularity."""
    rng = np.random.default_rng(7)
    lengths = np.diff(log.user_splits)
    middling = np.flatnonzero((lengths >= np.quantile(lengths, 0.3)) & (lengths <= np.quantile(lengths, 0.7)))
    chosen = rng.choice(middling if len(middling) else np.arange(len(lengths)), USERS_SHOWN)
    pins, counts = np.unique(dataset.pins, return_counts=True)
    users = []
    for user in log.user_ids[chosen].tolist():
        unseen = ~np.isin(pins, dataset.pins[dataset.users == user])
        if not unseen.any():  # in a small dataset, a user may have acted on every pin
            unseen[:] = True
        weights = counts[unseen] / counts[unseen].sum()
        size = min(CANDIDATES, int(unseen.sum()))
        users.append({"id": user, "pins": rng.choice(pins[unseen], size, replace=False, p=weights).tolist()})
    return {"users": users, "titles": {str(pin): title for pin, title in dataset.titles.items()}}


@contextmanager
def steps(first: str) -> Iterator[Progress]:
    """Show the current step; its progress bar moves back and forth if the amount of work is unknown."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(first, total=None)
        yield progress
        progress.update(task, total=1, completed=1)
