"""The demo: fills a feature store from real ratings, starts a server, and shows how it ranks for a few users.

python -m deploy.demo.demo                MovieLens-1M, with the model in deploy/demo/models
python -m deploy.demo.demo --data FOLDER  a dataset of RecBole atomic files; trains a ranker first
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import numpy as np
import typer
from rich.text import Text

from deploy.demo.home import CATALOGUE, HERE, PINRANK, DemoError, Home, console, prepared, steps
from feature_client.codec import decode_sequence
from feature_client.stores.open_store import open_store
from model_store.bundle.files import BundleError
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import open_model_store
from pinrank.v1 import ranking_pb2
from ranker.cache_folder import default_cache_dir
from ranker.errors import RankerError
from server.cli.console import fail
from server.cli.rank_call import RankCallError, call_rank, show

LOG, TOKEN = "server.log", "token"
ACTIONS_SHOWN, PINS_SHOWN = 6, 8


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder of RecBole atomic files to use instead of MovieLens-1M.")
    ] = None,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 selects a free one.")] = 50051,
    http_port: Annotated[int, typer.Option(help="Port of /metrics and /healthz; 0 selects a free one.")] = 9095,
    once: Annotated[bool, typer.Option("--once", help="Stop the server after showing the rankings.")] = False,
    train: Annotated[str, typer.Option(help="Options for `pinrank train`, when --data needs a ranker.")] = "",
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Download the data and fill the feature store, but start no server.")
    ] = False,
) -> None:
    """Fill a feature store from real ratings, start a server, and explain its rankings for a few users."""
    # A shell that starts this in the background sets SIGINT to be ignored. SIGTERM must stop the server, too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    serving = False
    try:
        home = prepared(data, shlex.split(train))
        if prepare:
            console.print(f"features {home.store_url}\ncatalogue {home.folder / CATALOGUE}", soft_wrap=True)
            return
        with running_server(home, grpc_port, http_port) as (address, http_address, process), linked(home, address):
            show_rankings(home, address)
            if not once:
                show_how_to_call(home, address, http_address)
                serving = True
                console.print("The server keeps running; Ctrl-C stops it.", style="bold")
                raise DemoError(
                    f"the server ended with exit status {exit_status(process)}; its log is {home.folder / LOG}"
                )
    except (RankerError, ModelStoreError, BundleError, RankCallError, DemoError, OSError) as error:
        fail(str(error), error)
    except KeyboardInterrupt:
        console.print("\nstopped")
        raise typer.Exit(0 if serving else 130) from None


def exit_status(process: subprocess.Popen[str]) -> int:
    """Wait until the server ends; one second at a time, as a signal just before a blocking wait would be lost."""
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def running_server(home: Home, grpc_port: int, http_port: int) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """Start `pinrank serve`, wait until it serves, and yield its addresses. Its log is in the demo's folder."""
    manifest = home.bundle.manifest
    command = [
        PINRANK, "serve", "--config", str(HERE / "pinrank.toml"), "--feature-store", home.store_url,
        "--model-store", str(home.models), "--model", manifest.name,
        "--grpc-port", str(grpc_port), "--http-port", str(http_port),
    ]  # fmt: skip
    labels = sorted(open_model_store(home.models).labels(manifest.name), reverse=True)  # `stable` first, as the default
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PINRANK_")}
    environment |= {
        "PINRANK_LOG_FORMAT": "json",
        "PINRANK_LABELS": json.dumps(labels),
        "PINRANK_ADMIN_TOKEN_FILE": str(token(home)),
    }
    with (
        (home.folder / LOG).open("a", buffering=1) as log,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process,
    ):
        assert process.stderr is not None  # noqa: S101 - Popen opened a pipe
        try:
            with steps("starting the server"):
                event = _until_serving(process.stderr, log)
            copier = threading.Thread(target=log.writelines, args=(process.stderr,), daemon=True)
            copier.start()
            try:
                yield event["grpc"], event["http"], process
            finally:
                process.terminate()
                copier.join()  # it ends when the server does
        finally:
            process.terminate()
            process.wait()


def token(home: Home) -> Path:
    """Return the file with the token for `pinrank model` commands; only this user may read it."""
    path = home.folder / TOKEN
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe() + "\n")
    return path


@contextmanager
def linked(home: Home, address: str) -> Iterator[None]:
    """Link the served ids under the server's port while it runs, so that `make load` finds them."""
    link = default_cache_dir() / "demo" / f"serving-{address.rpartition(':')[2]}"
    new = link.with_name(f".{link.name}-{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(home.folder.name)
    new.replace(link)
    try:
        yield
    finally:
        link.unlink(missing_ok=True)


def _until_serving(lines: IO[str], log: IO[str]) -> dict[str, str]:
    unstructured = []
    for line in lines:
        log.write(line)
        if not line.startswith("{"):
            unstructured.append(line.strip())
            continue
        event: dict[str, str] = json.loads(line)
        if event["event"] == "serving":
            return event
    reason = " ".join(unstructured)
    reason = reason[reason.find("error: ") + 7 :]
    if "cannot listen" in reason:
        reason = f"{reason.partition(';')[0]}; choose other ports: make demo ARGS='--grpc-port 0 --http-port 0'"
    raise DemoError(f"the server did not start: {reason}")


def show_rankings(home: Home, address: str) -> None:
    catalogue = home.catalogue()
    titles = {int(pin): title for pin, title in catalogue["titles"].items()}
    if home.of_ratings:
        console.print(
            "A rating of 5 counts as a save, 4 or more as a like, 2 or less as a hide, and any rating as a closeup.\n"
            "The data has no creators, merchants or ads. So creator_tail tells how rarely a pin was rated, and a hash "
            "of a pin's id decides whether it is shoppable or promoted.\n"
        )
    else:
        predicted = ", ".join(f"{head.name} ({head.meaning})" for head in home.bundle.manifest.heads)
        console.print(f"predicted actions: {predicted}\n")
    for number, user in enumerate(catalogue["users"]):
        events = asyncio.run(last_events(home, user["id"]))
        query = None if number < len(catalogue["users"]) - 1 else int(events["pin_id"][-1])
        actions = home.sequence.actions
        newest = [(f"{actions[e['action']]} ", titles[int(e["pin_id"])]) for e in events[-ACTIONS_SHOWN:][::-1]]
        surface = "home" if query is None else f"related to {titles[query]}"
        console.rule(f"user {user['id']} · {surface}")
        listed = Text(", ").join(Text.assemble(action, (title, "italic")) for action, title in newest)
        console.print(Text(f"{len(events)} actions on record; newest first: ").append_text(listed).append("\n"))
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
    port = address.rpartition(":")[2]
    console.rule("call it yourself")
    console.print(
        f"  .venv/bin/pinrank rank --address {address} --user {user['id']} --pins {pins}\n"
        f"  .venv/bin/pinrank model status --address {address} --token-file {home.folder / TOKEN}\n"
        f"  curl http://{http_address}/metrics\n"
        f"  make load PORT={port} ARGS='--rate 50'\n"
        f"  any gRPC client: proto/pinrank/v1/ranking.proto, or server reflection at {address}\n",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
