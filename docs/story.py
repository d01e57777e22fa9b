"""A story: a folder with a model store, features and a running server, and the commands that run in it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.features.synthetic import fill
from docs.changed_bundles import made
from feature_client.stores.open_store import open_store
from model_store.bundle.files import Bundle
from model_store.registry.store import open_model_store
from pinrank.channels import open_channel
from pinrank.v1 import models_pb2, models_pb2_grpc, ranking_pb2, ranking_pb2_grpc

ROOT = Path(__file__).parents[1]
PINRANK = str(Path(sys.executable).with_name("pinrank"))
USERS, PINS, CANDIDATES = 300, 400, 30
#: The version that a story begins with, whatever its number in the demo.
_VERSION = 7
_TOKEN = "of-the-story"  # noqa: S105 - on loopback, gone with the server
_SETTINGS = """
model_store = "models"
model = "ml1m"
feature_store = "{features}"
admin_token_file = "token"
record_actions = true
record_user_actions_per_s = 0
[swap]
poll_s = 0.2
retry_s = 6
cpu_share = 1
accept_changes = ["inputs.query.space"]
[guard]
requests_min = 60
p99_ratio_max = 1000
"""
#: The page shows these as they are; only what the story is about differs in them from a real server's.
_WAIT_S = 60.0
#: A finished progress bar, which a terminal would not keep.
_PROGRESS = re.compile(r"━{10,} +[\d,]+/[\d,]+ ")


class Story:
    """A folder with a model store, features and a server. Records the commands that run in it, and their output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.address = ""

    def say(self, text: str) -> None:
        self.lines.append(f"# {text}")

    def run(self, *arguments: str, shown: bool = True) -> str:
        """Run a pinrank command."""
        added = []
        if arguments[:2] == ("model", "status"):
            added = ["--address", self.address, "--token-file", "token"]
        elif arguments[0] == "rank":
            added = ["--address", self.address]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PINRANK_")}
        environment |= {"COLUMNS": "118", "NO_COLOR": "1", "TERM": "dumb", "PINRANK_MODEL_STORE": "models"}
        done = subprocess.run(
            [PINRANK, *arguments, *added],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        said = "\n".join(
            line.rstrip() for line in (done.stdout + done.stderr).splitlines() if not _PROGRESS.search(line)
        )
        if shown:
            self.lines += [f"$ pinrank {' '.join(_quoted(a) for a in arguments)}", *said.splitlines()]
            if done.returncode:
                self.lines.append(f"(exit {done.returncode})")
        return said

    def requests(self, count: int) -> None:
        """Send rank requests for that many users. Every answer must be complete."""
        rng = np.random.default_rng(count)
        with open_channel(self.address) as channel:
            stub = ranking_pb2_grpc.RankingServiceStub(channel)
            for user in rng.integers(1, USERS + 1, count).tolist():
                pins = rng.choice(np.arange(1, PINS + 1), CANDIDATES, replace=False).tolist()
                request = ranking_pb2.RankRequest(user_id=user, pin_ids=pins, surface="home")
                answer = stub.Rank(request, timeout=20)
                assert len(answer.pin_ids) == CANDIDATES, "an answer lacks candidates"  # noqa: S101
        self.lines.append(f"  ... {count} requests are answered ...")

    def wait(self, condition: Callable[[models_pb2.StatusResponse], bool]) -> None:
        """Wait until the server's status fulfils a condition. Raises TimeoutError."""
        with open_channel(self.address) as channel:
            stub = models_pb2_grpc.ModelServiceStub(channel)
            until_s = time.monotonic() + _WAIT_S
            while time.monotonic() < until_s:
                status = stub.Status(
                    models_pb2.StatusRequest(), timeout=20, metadata=(("authorization", f"Bearer {_TOKEN}"),)
                )
                if condition(status):
                    return
                time.sleep(0.05)
        raise TimeoutError(
            "\n".join([*self.lines, f"the server never reached the expected status; it has {list(status.versions)}"])
        )


def _quoted(argument: str) -> str:
    return f'"{argument}"' if " " in argument else argument


def phase(version: int, phase: str) -> Callable[[models_pb2.StatusResponse], bool]:
    def holds(status: models_pb2.StatusResponse) -> bool:
        found = {one.version: one.phase for one in status.versions}
        return found.get(version, "gone") == phase

    return holds


@contextmanager
def story_of(settings: str = "", added: Mapping[str, bytes] | None = None) -> Iterator[tuple[Story, Bundle]]:
    """A server with the demo's `stable` as version 7, with further settings, and further files in its bundle."""
    source = open_model_store(ROOT / "deploy" / "demo" / "models")
    bundle = source.read("ml1m", source.resolve("ml1m", "stable"))
    with tempfile.TemporaryDirectory(prefix="pinrank-story-") as temporary:
        folder = Path(temporary)
        made(folder / "out" / "7", bundle, _VERSION, added=added)
        store = open_model_store(folder / "models")
        store.publish(folder / "out" / "7", by="anna", why="the first")
        store.set_label("ml1m", "stable", _VERSION, by="anna", why="the first")
        features = f"lmdb://{folder / 'features'}"
        asyncio.run(_filled(features, bundle))
        (folder / "token").write_text(_TOKEN)
        (folder / "pinrank.toml").write_text(_SETTINGS.format(features=features) + settings.format(folder=folder))
        with serving(folder) as story:
            yield story, bundle


@contextmanager
def serving(folder: Path) -> Iterator[Story]:
    """A server that runs in a folder, with its pinrank.toml."""
    story = Story(folder)
    command = [PINRANK, "serve", "--config", "pinrank.toml", "--grpc-port", "0", "--http-port", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PINRANK_")}
    with subprocess.Popen(
        command, cwd=folder, env=environment | {"PINRANK_LOG_FORMAT": "json"}, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None  # noqa: S101 - asked for
        try:
            for line in server.stderr:
                if not line.startswith("{"):
                    raise RuntimeError(f"the server did not start: {line}{server.stderr.read()}")
                event = json.loads(line)
                if event["event"] == "serving":
                    story.address = event["grpc"]
                    break
            yield story
        finally:
            server.terminate()
            server.communicate(timeout=60)


async def _filled(url: str, bundle: Bundle) -> None:
    store = open_store(url)
    await store.start()
    await fill(store, bundle, USERS, seed=7, pins=PINS)
    await store.close()
