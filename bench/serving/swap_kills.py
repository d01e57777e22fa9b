"""Kill servers at random points while they load versions, and while labels move and versions are published.

A point is a line of the server's log, counted from its start, so the benchmark does not depend on time. After every
kill, the model store must be intact, and the next server must serve the version that the label names.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.harness import BenchmarkError, Claim, Conclusion, Raw
from bench.serving.swaps import prepared, publish
from bench.test_bed import CONFIG
from model_store.bundle.files import Bundle, BundleError
from model_store.registry.objects import ModelStoreError
from model_store.registry.store import ModelStore, open_model_store
from pinrank.channels import open_channel
from pinrank.v1 import ranking_pb2, ranking_pb2_grpc

_SEED = 7
_LABEL = "stable"


@dataclass(frozen=True, slots=True)
class SwapKillsPlan:
    kills: int = 100
    #: Range of log lines after `serving` at which the kill may happen; it covers several swaps.
    lines_max: int = 24


QUICK = SwapKillsPlan(kills=2, lines_max=6)


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start."""
    plan = QUICK if quick else SwapKillsPlan()
    rng = random.Random(_SEED)
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pinrank-kills-") as temporary:
        folder = Path(temporary)
        own, store, bundle = prepared(folder, config)
        own.write_text(own.read_text() + "[swap]\npoll_s = 0.05\nrank_correlation_min = -1\n")
        for _ in range(plan.kills):
            kills.append(_kill(plan, rng, own, store, bundle, folder, first=100 + 50 * len(kills)))
            yield {"plan": asdict(plan), "kills": kills}


def _kill(
    plan: SwapKillsPlan, rng: random.Random, own: Path, store: ModelStore, bundle: Bundle, folder: Path, first: int
) -> dict[str, Any]:
    """Start a server, check its version, move the label until the kill, and inspect the store."""
    model, lines = bundle.manifest.name, rng.randrange(1, plan.lines_max)
    command = [
        sys.executable, "-c", "from server.cli.main import app; app()", "serve", "--config", str(own),
        "--grpc-port", "0", "--http-port", "0",
    ]  # fmt: skip
    moves, phases = 0, []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None  # noqa: S101 - the pipe was requested
        wanted = store.resolve(model, _LABEL)
        answered = 0
        for line in server.stderr:
            event = json.loads(line)
            if event["event"] == "serving":
                answered = _answered_by(event["grpc"])
                break
        else:
            raise BenchmarkError(f"the server ended with {server.wait()}")
        # Every log line triggers the next change, so the server is never idle and nothing waits.
        for count, line in enumerate(_with_a_first(server.stderr)):
            if line:
                event = json.loads(line)
                phases.append(event.get("phase", event["event"]))
            if count >= lines:
                server.kill()
                break
            if count % 2 == 0:
                publish(store, bundle, first + moves, {}, {}, folder)
                store.set_label(model, _LABEL, first + moves, by="bench")
                moves += 1
        server.wait()
        server.stderr.read()  # wait for its helper to end, too
    return {
        "served": answered == wanted,
        "killed_at": phases[-1] if phases else "serving",
        "moves": moves,
        **_looked_at(store.where, model),
    }


def _with_a_first(lines: Any) -> Any:
    """Yield an empty line, for the first change, and then the lines of the log."""
    yield ""
    for line in lines:  # noqa: UP028 - `yield from` would close the pipe with this generator
        yield line


def _answered_by(address: str) -> int:
    with open_channel(address) as channel:
        request = ranking_pb2.RankRequest(user_id=1, pin_ids=[1, 2, 3], surface="home")
        answer = ranking_pb2_grpc.RankingServiceStub(channel).Rank(request, timeout=20)
    return int(answer.versions.model_version)


def _looked_at(where: str, model: str) -> dict[str, Any]:
    """Read the store from scratch, and count inconsistencies."""
    store = open_model_store(where)
    try:
        history = store.history(model)
        state = store.state(model)
    except ModelStoreError as error:
        return {"unreadable": str(error), "lost": 0, "labels_to_nowhere": 0}
    lost = 0
    for version in sorted(state.versions)[-5:]:
        try:
            store.read(model, version)
        except (BundleError, ModelStoreError):
            lost += 1
    nowhere = sum(not set(entry.state.labels.values()) <= set(entry.state.versions) for entry in history)
    whole = [entry.number for entry in history] == list(range(1, len(history) + 1))
    return {"unreadable": "" if whole else "an entry is missing", "lost": lost, "labels_to_nowhere": nowhere}


def conclude(raw: Raw) -> Conclusion:
    kills = raw["kills"]
    points: dict[str, int] = {}
    for kill in kills:
        points[kill["killed_at"]] = points.get(kill["killed_at"], 0) + 1
    claims = (
        Claim("stores that could not be read", sum(bool(k["unreadable"]) for k in kills), 0, "kills", "at_most"),
        Claim("versions lost or half there", sum(k["lost"] for k in kills), 0, "versions", "at_most"),
        Claim("labels to nowhere", sum(k["labels_to_nowhere"] for k in kills), 0, "entries", "at_most"),
        Claim("servers that served another version", sum(not k["served"] for k in kills), 0, "kills", "at_most"),
    )
    summary = {"kills": float(len(kills)), "labels moved": float(sum(k["moves"] for k in kills))}
    summary |= {f"killed at {point}": float(count) for point, count in sorted(points.items())}
    return Conclusion(summary, claims)
