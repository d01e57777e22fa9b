"""The demo: real ratings into a feature store, a real server, real calls, shown to a person.

python deploy/demo/demo.py                MovieLens-1M, ranked by the model committed beside this file
python deploy/demo/demo.py --data FOLDER  another dataset of RecBole atomic files; trains a ranker on it first
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from feature_client.codec import decode_sequence
from feature_client.embedded import EmbeddedStore
from feature_client.groups import SequenceGroup
from feature_client.opening import open_store
from model_store.bundle import EMBEDDINGS, Bundle
from model_store.store import open_model_store
from pinrank.v1 import ranking_pb2
from ranker.actions import ActionLog, action_log
from ranker.atomic import AtomicDataset, read_atomic
from ranker.embeddings import decode_embeddings
from ranker.errors import DatasetError, ObtainError
from ranker.features import Groups, fill_store
from ranker.movielens import LICENCE, default_cache_dir, obtain
from server.client import RankCallError, call_rank, show

HERE = Path(__file__).parent
PINRANK = str(Path(sys.executable).with_name("pinrank"))
CATALOGUE, LOG = "catalogue.json", "server.log"
USERS_SHOWN, CANDIDATES, ACTIONS_SHOWN, PINS_SHOWN = 3, 128, 6, 8

console = Console()


@dataclass(frozen=True, slots=True)
class Home:
    """Where the demo's prepared things are: nothing of the dataset is kept in the repository."""

    models: Path
    bundle: Bundle
    folder: Path

    @property
    def store_url(self) -> str:
        return f"lmdb://{self.folder / 'features'}"

    @property
    def sequence(self) -> SequenceGroup:
        if (group := self.bundle.manifest.sequence) is None:
            raise DemoError(f"{self.bundle.manifest.ref} reads no actions; the demo shows a ranker that does")
        return group

    def catalogue(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / CATALOGUE).read_text())
        return content


def main(
    data: Annotated[Path | None, typer.Option(help="Folder of RecBole atomic files instead of MovieLens-1M.")] = None,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 takes a free one.")] = 50051,
    http_port: Annotated[int, typer.Option(help="Port of /metrics and /healthz; 0 takes a free one.")] = 9095,
    once: Annotated[bool, typer.Option("--once", help="Stop the server after showing the rankings.")] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only get the data and fill the feature store.")] = False,
) -> None:
    """Fill a feature store from real ratings, start the server, rank for a few real users and show why."""
    # A shell that starts this in the background leaves SIGINT ignored; SIGTERM must stop the server too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    serving = False
    try:
        home = prepared(data)
        if prepare:
            console.print(f"features {home.store_url}\ncatalogue {home.folder / CATALOGUE}", soft_wrap=True)
            return
        with running_server(home, grpc_port, http_port) as (address, http_address, process):
            show_rankings(home, address)
            show_how_to_call(home, address, http_address)
            if not once:
                serving = True
                console.print("[bold]The server stays up; Ctrl-C stops it.[/]")
                raise DemoError(f"the server ended with {ended(process)}; its log is {home.folder / LOG}")
    except (ObtainError, DatasetError, RankCallError, DemoError, OSError) as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        console.print("\nstopped")
        raise typer.Exit(0 if serving else 130) from None


def ended(process: subprocess.Popen[str]) -> int:
    """Wait for the server to end; in turns, because a signal that comes just before a blocking wait would be lost."""
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def prepared(data: Path | None) -> Home:
    """Obtain the data, and on the first run fill the feature store; later runs find it filled."""
    cache = default_cache_dir()
    if data is None:
        if not (cache / "ml-1m").is_dir():
            with steps("downloading MovieLens-1M"):
                obtain(cache)
        console.print(Panel(LICENCE.strip(), title="the data's licence", border_style="yellow"))
        data, models = cache / "ml-1m", HERE / "models"
        model = "ml1m"
    else:
        data = data.resolve()
        if not any(data.glob("*.inter")):
            raise DemoError(f"{data} holds no RecBole atomic files; a NAME.inter is needed")
        models = cache / "demo" / f"{data.name}-models"
        model = trained_on(data, models)
    store = open_model_store(models)
    bundle = store.read(model, store.resolve(model, "stable"))
    # What is stored depends on the bundle and on the layout of its sequence.
    layout = bundle.manifest.sequence.fingerprint.hex()[:6] if bundle.manifest.sequence else "none"
    home = Home(models, bundle, cache / "demo" / f"{data.name}-{bundle.digest[:12]}-{layout}")
    if not home.folder.exists():
        fill(home, data)
    link = cache / "demo" / f".latest-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(home.folder.name)
    link.replace(cache / "demo" / "latest")
    return home


def trained_on(data: Path, models: Path) -> str:
    """Train a ranker for a dataset that has none yet; return the model's name."""
    model = "demo"
    if not (models / model / "labels" / "stable").exists():
        console.print(f"no ranker for {data.name} yet: training one (minutes; needs the extra `train`)")
        command = [PINRANK, "train", "--data", str(data), "--name", model, "--store", str(models), "--label", "stable"]
        if subprocess.run([*command, "--utility", str(HERE / "utility.toml")], check=False).returncode:
            raise DemoError("training failed; the message above says why")
    return model


def fill(home: Home, data: Path) -> None:
    """Fill the feature store and note what a person wants to see; the folder appears whole or not at all."""
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
        # For `pinrank load`: everyone, and the pins by falling popularity.
        (staging / "users.json").write_text(json.dumps(log.user_ids.tolist()))
        pins, counts = np.unique(dataset.pins, return_counts=True)
        (staging / "pins.json").write_text(json.dumps(pins[np.argsort(-counts, kind="stable")].tolist()))
        staging.chmod(0o755)
        if not home.folder.exists():  # another first start may have been quicker
            staging.rename(home.folder)
    console.print(
        f"{len(log.user_ids):,} users, {len(log.pin_ids):,} pins, {len(dataset.users):,} actions: {home.store_url}",
        soft_wrap=True,
    )


async def _fill(path: Path, log: ActionLog, home: Home, progress: Callable[[str, int], None]) -> None:
    store = EmbeddedStore(path)
    await store.start()
    embeddings = decode_embeddings(home.bundle.files[EMBEDDINGS])
    await fill_store(store, log, embeddings, Groups.served_by(home.bundle.manifest), progress)
    await store.close()


def catalogue(dataset: AtomicDataset, log: ActionLog) -> dict[str, Any]:
    """Choose users with a middling history, and for each candidates that they have not acted on, by popularity."""
    rng = np.random.default_rng(7)
    lengths = np.diff(log.user_splits)
    middling = np.flatnonzero((lengths >= np.quantile(lengths, 0.3)) & (lengths <= np.quantile(lengths, 0.7)))
    chosen = rng.choice(middling if len(middling) else np.arange(len(lengths)), USERS_SHOWN)
    pins, counts = np.unique(dataset.pins, return_counts=True)
    users = []
    for user in log.user_ids[chosen].tolist():
        unseen = ~np.isin(pins, dataset.pins[dataset.users == user])
        weights = counts[unseen] / counts[unseen].sum()
        size = min(CANDIDATES, int(unseen.sum()))
        users.append({"id": user, "pins": rng.choice(pins[unseen], size, replace=False, p=weights).tolist()})
    return {"users": users, "titles": {str(pin): title for pin, title in dataset.titles.items()}}


@contextmanager
def steps(first: str) -> Iterator[Progress]:
    """Show what is being done: a bar where the amount is known, else a moving one."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(first, total=None)
        yield progress
        progress.update(task, total=1, completed=1)


@contextmanager
def running_server(home: Home, grpc_port: int, http_port: int) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """Start `pinrank serve` and give its addresses once it serves; its log goes to a file beside the features."""
    manifest = home.bundle.manifest
    command = [
        PINRANK, "serve", "--config", str(HERE / "pinrank.toml"), "--feature-store", home.store_url,
        "--model-store", str(home.models), "--model", manifest.name,
        "--grpc-port", str(grpc_port), "--http-port", str(http_port),
    ]  # fmt: skip
    labels = sorted(open_model_store(home.models).labels(manifest.name), reverse=True)  # `stable` first: the default
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PINRANK_")}
    environment |= {"PINRANK_LOG_FORMAT": "json", "PINRANK_LABELS": json.dumps(labels)}
    with (
        (home.folder / LOG).open("a", buffering=1) as log,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process,
    ):
        assert process.stderr is not None  # noqa: S101 - asked for a pipe
        try:
            with steps("starting the server"):
                event = _until_serving(process.stderr, log)
            copier = threading.Thread(target=log.writelines, args=(process.stderr,), daemon=True)
            copier.start()
            try:
                yield event["grpc"], event["http"], process
            finally:
                process.terminate()
                copier.join()  # ends with the server
        finally:
            process.terminate()
            process.wait()


def _until_serving(lines: IO[str], log: IO[str]) -> dict[str, str]:
    said = []
    for line in lines:
        log.write(line)
        if not line.startswith("{"):
            said.append(line.strip())
            continue
        event: dict[str, str] = json.loads(line)
        if event["event"] == "serving":
            return event
    reason = " ".join(said)
    reason = reason[reason.find("error: ") + 7 :]
    if "cannot listen" in reason:
        reason = f"{reason.partition(';')[0]}; choose other ports: make demo ARGS='--grpc-port 0 --http-port 0'"
    raise DemoError(f"the server did not start: {reason}")


def show_rankings(home: Home, address: str) -> None:
    catalogue = home.catalogue()
    titles = {int(pin): title for pin, title in catalogue["titles"].items()}
    console.print(
        "A rating of 5 counts as a save, 4 or more as a like, 2 or less as a hide, any rating as a closeup.\n"
        "The data knows no creators, merchants or ads: a pin's creator_tail is how rarely it was rated, and which pins "
        "are shoppable or promoted is made up from a hash of their id.\n"
    )
    for number, user in enumerate(catalogue["users"]):
        events = asyncio.run(last_events(home, user["id"]))
        query = None if number < len(catalogue["users"]) - 1 else int(events["pin_id"][-1])
        actions = home.sequence.actions
        newest = ", ".join(
            f"{actions[e['action']]} [italic]{titles[int(e['pin_id'])]}[/]" for e in events[-ACTIONS_SHOWN:][::-1]
        )
        surface = "home" if query is None else f"related to [italic]{titles[query]}[/]"
        console.rule(f"user {user['id']} · {surface}")
        console.print(f"{len(events)} actions on record; newest first: {newest}\n")
        request = ranking_pb2.RankRequest(
            user_id=user["id"], pin_ids=user["pins"], surface="home", top_k=PINS_SHOWN, explain=True
        )
        if query is not None:
            request.surface, request.query.pin_id = "related", query
        response = call_rank(address, request, timeout_s=10)
        show(response, console, titles)
        console.print(f"(the best {len(response.pin_ids)} of {len(user['pins'])} candidates)\n")


async def last_events(home: Home, user: int) -> np.ndarray:
    store = open_store(home.store_url, read_only=True)
    await store.start()
    (value,) = await store.multi_get(home.sequence.keys(np.array([user], np.uint64)))
    await store.close()
    return decode_sequence(home.sequence, value)[0]


def show_how_to_call(home: Home, address: str, http_address: str) -> None:
    user = home.catalogue()["users"][0]
    pins = ",".join(map(str, user["pins"][:3]))
    console.rule("call it yourself")
    console.print(
        f"  .venv/bin/pinrank rank --address {address} --user {user['id']} --pins {pins}\n"
        f"  curl http://{http_address}/metrics\n"
        f"  make load ARGS='--rate 50 --address {address}'\n"
        f"  any gRPC client: proto/pinrank/v1/ranking.proto, or server reflection at {address}\n",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
