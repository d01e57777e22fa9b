"""Play the two stories of docs/models.md with the real commands, a real server and real requests.

    python -m docs.transcripts            prints the transcripts
    python -m docs.transcripts --write    puts them into docs/models.md, between their markers

The page shows what the commands printed. A test plays the stories again and compares; only for this comparison, what
differs from run to run (times, digests, measured values) is masked.
"""

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
from docs.changed_bundles import made, scaled_logits, with_moved_embeddings
from docs.markers import with_marked
from feature_client.codec import decode_rows
from feature_client.groups import FeatureGroup
from feature_client.stores.open_store import open_store
from model_store.bundle.files import Bundle
from model_store.registry.entries import whoami
from model_store.registry.store import open_model_store
from pinrank.channels import open_channel
from pinrank.v1 import models_pb2, models_pb2_grpc, ranking_pb2, ranking_pb2_grpc

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
PINRANK = str(Path(sys.executable).with_name("pinrank"))
USERS, PINS, CANDIDATES = 300, 400, 30
_TOKEN = "of-the-story"  # noqa: S105 - on loopback, gone with the server
_SETTINGS = """
model_store = "models"
model = "ml1m"
feature_store = "{features}"
admin_token_file = "token"
record_actions = true
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
        added = ["--address", self.address, "--token-file", "token"] if arguments[:2] == ("model", "status") else []
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PINRANK_")}
        environment |= {"COLUMNS": "118", "NO_COLOR": "1", "TERM": "dumb", "PINRANK_MODEL_STORE": "models"}
        done = subprocess.run(
            [PINRANK, *arguments, *added],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        said = "\n".join(line.rstrip() for line in (done.stdout + done.stderr).splitlines())
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
    """A server with version 7 as `stable`, with further settings, and further files in its bundle."""
    source = open_model_store(ROOT / "deploy" / "demo" / "models")
    bundle = source.read("ml1m", source.resolve("ml1m", "stable"))
    with tempfile.TemporaryDirectory(prefix="pinrank-story-") as temporary:
        folder = Path(temporary)
        made(folder / "out" / "7", bundle, bundle.manifest.version, added=added)
        store = open_model_store(folder / "models")
        store.publish(folder / "out" / "7", by="anna", why="the first")
        store.set_label("ml1m", "stable", bundle.manifest.version, by="anna", why="the first")
        features = f"lmdb://{folder / 'features'}"
        asyncio.run(_filled(features, bundle))
        (folder / "token").write_text(_TOKEN)
        (folder / "pinrank.toml").write_text(_SETTINGS.format(features=features) + settings.format(folder=folder))
        story = Story(folder)
        command = [PINRANK, "serve", "--config", "pinrank.toml", "--grpc-port", "0", "--http-port", "0"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PINRANK_")}
        with subprocess.Popen(
            command, cwd=folder, env=environment | {"PINRANK_LOG_FORMAT": "json"}, stderr=subprocess.PIPE, text=True
        ) as server:
            assert server.stderr is not None  # noqa: S101 - asked for
            try:
                for line in server.stderr:
                    event = json.loads(line)
                    if event["event"] == "serving":
                        story.address = event["grpc"]
                        break
                yield story, bundle
            finally:
                server.terminate()
                server.communicate(timeout=60)


async def _filled(url: str, bundle: Bundle) -> None:
    store = open_store(url)
    await store.start()
    await fill(store, bundle, USERS, seed=7, pins=PINS)
    await store.close()


def bad_models() -> list[str]:
    """Publish three bad versions, each of which is caught at another stage."""
    with story_of() as (story, bundle):
        made(story.folder / "out" / "8", bundle, 8, scaled_logits(1.0, 0.5), honest=False)
        made(story.folder / "out" / "9", bundle, 9, scaled_logits(-1.0, 0.0))
        made(story.folder / "out" / "10", bundle, 10, scaled_logits(1.0, 3.0))
        story.requests(200)
        story.say("Version 8 does not reproduce its golden scores, so it cannot be published.")
        story.run("model", "publish", "out/8")
        story.say("Version 9 reproduces its golden scores but reverses the order of the candidates.")
        story.say("The server tries it on recent requests before it answers any.")
        story.run("model", "publish", "out/9", "--label", "stable", "--by", "ben", "--why", "new loss")
        story.wait(phase(9, "failed"))
        story.requests(20)
        story.run("model", "status")
        story.run("model", "rollback", "ml1m", "stable", "--by", "ben", "--why", "9 is upside down")
        story.wait(phase(9, "gone"))
        story.say("Version 10 orders well, but its probabilities are far too high. As a canary it gets 20% of users.")
        story.run("model", "publish", "out/10", "--label", "canary", "--by", "ben", "--why", "more epochs")
        story.run("model", "traffic", "ml1m", "canary", "20", "--by", "ben")
        story.wait(phase(10, "serving"))
        store, after = open_model_store(story.folder / "models"), 0
        while store.labels("ml1m")["canary"] == 10 and after < 5_000:
            story.requests(400)
            story.lines.pop()
            after += 400
        story.lines.append("  ... some hundred requests are answered ...")
        story.wait(phase(10, "gone"))
        story.run("model", "history", "ml1m")
        story.run("model", "gc", "ml1m", "--keep", "0", "--grace-s", "0", "--by", "anna")
        return story.lines


def roll_over() -> list[str]:
    """Move the pin embeddings, and the ranker with them, to a new embedding space."""
    with story_of() as (story, bundle):
        groups = tuple(with_moved_embeddings(g) if g.entity == "pin" else g for g in bundle.manifest.groups)
        made(story.folder / "out" / "11", bundle, 11, groups=groups)
        story.requests(200)
        story.run("model", "publish", "out/11", "--by", "anna", "--why", "embeddings v3")
        features = f"lmdb://{story.folder / 'features'}"
        story.run("model", "diff", "ml1m", "stable", "11", "--feature-store", features)
        story.say("No caller of this server sends embeddings as a query, so swap.accept_changes accepts the change.")
        story.say("The label may move before its features are loaded: version 11 waits, version 7 goes on answering.")
        story.run("model", "label", "ml1m", "stable", "11", "--by", "anna", "--why", "embeddings v3")
        story.requests(20)
        story.wait(phase(11, "failed"))
        story.run("model", "status")
        before = next(group for group in bundle.manifest.groups if group.entity == "pin")
        asyncio.run(_write_rows(story.folder / "pins.npz", features, before))
        story.run(
            "features", "load", "pins.npz", "--group", before.name, "--feature-store", features,
            "--model-store", "models", "--model", "ml1m", "--label", "stable",
        )  # fmt: skip
        story.wait(phase(11, "serving"))
        story.wait(phase(7, "gone"))
        story.requests(20)
        story.run("model", "status")
        story.run("model", "diff", "ml1m", "7", "stable", "--feature-store", features)
        return story.lines


async def _write_rows(path: Path, features: str, before: FeatureGroup) -> None:
    """Write a file of the new space's features: in this story, the old vectors under the name of the new space."""
    store = open_store(features)
    await store.start()
    ids = np.arange(1, PINS + 1, dtype=np.uint64)
    rows = decode_rows(before, await store.multi_get(before.keys(ids))).rows
    await store.close()
    columns = {"id": ids, **{field.name: rows[field.name] for field in before.fields}}
    np.savez(path, **columns)  # type: ignore[arg-type]


STORIES = {"bad models": bad_models, "roll-over": roll_over}


def shown(lines: list[str]) -> str:
    """Return a transcript as the page shows it: without the temporary folder's path and this machine's name."""
    text = re.sub(r"/\S*pinrank-story-[a-z0-9_]+", "/srv", "\n".join(lines))
    # The name keeps its length, so that tables stay aligned.
    return text.replace(whoami(), "pinrank@ranker".ljust(len(whoami()))[: len(whoami())])


def masked(text: str) -> str:
    """Return a transcript with everything masked that differs from run to run."""
    text = re.sub(r" *│\n│[ │]*", " ", text)  # tables wrap sentences at different words
    for pattern, mask in (
        (r"\b[0-9a-f]{64}\b", "DIGEST"),
        (r"\b[0-9a-f]{12}\b", "DIGEST"),
        (r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?", "TIME"),
        (r"guard of \S+", "guard of WHO"),
        (r"\d+(\.\d+)? (ms|MB|s ago|s)\b", r"N \2"),
        (r" +(N s ago)", r" \1"),
        (r"correlation is -?\d\.\d+", "correlation is N"),
        (r"by \d+\.\d+ \(PSI\)", "by N (PSI)"),
        (r"probability \d\.\d+, got \d\.\d+", "probability N, got N"),
        (r"PSI \d+\.\d+", "PSI N"),
        (r"golden row \d+, head '\w+'", "golden row N, head NAME"),
        (r"its \w+ probabilities", "its NAME probabilities"),
        (r"\d+\.\d% of \d+ (recent|candidates|users)", r"N% of N \1"),
        (r"recent requests: -?\d\.\d+", "recent requests: N"),
        (r"finite for all \d+", "finite for all N"),
        (r"candidates of \d+ recent", "candidates of N recent"),
        (r"of \d+ candidates of", "of N candidates of"),
        (r"\d+/\d+ \d+ rows/s", "N rows/s"),
    ):
        text = re.sub(pattern, mask, text)
    # A slow machine may log more attempts that fail in the same way.
    lines = text.splitlines()
    return "\n".join(line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1])


def main() -> None:
    page = PAGE.read_text()
    for name, play in STORIES.items():
        text = shown(play())
        if "--write" in sys.argv:
            page = with_marked(page, f"transcript: {name}", f"```console\n{text}\n```")
        else:
            print(f"== {name}\n{text}\n")
    if "--write" in sys.argv:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
