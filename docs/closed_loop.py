"""The story of docs/closed-loop.md: from logged answers to weights that give creators more, and what came of them.

The users are simulated. How they behave is fixed here, before anything is tuned or forecast:
a user looks at position k with probability 1 / log2(k + 2), and acts on what was looked at as the model predicts.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from docs.story import CANDIDATES, PINS, USERS, Story, phase, story_of
from impressions.reading import read_tables
from model_store.model.discount import discounts
from pinrank.channels import open_channel
from pinrank.v1 import (
    activity_pb2,
    activity_pb2_grpc,
    impressions_pb2,
    impressions_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)

EXPLORE = b"""
seed = 7
[surfaces.home]
kind = "weights"
share = 0.4
regret_max = 0.2
[surfaces.home.arms.some_more]
weights = { creator = 0.8 }
[surfaces.home.arms.more]
weights = { creator = 1.3 }
[surfaces.home.arms.most]
weights = { creator = 2.0 }
"""
_SETTINGS = """
party_loss_max = 0.5
[impressions]
to = "file://{folder}/log"
rotate_s = 1
"""


def visits(story: Story, count: int, seed: int) -> None:
    """Let users visit: rank, look at some of the answer, act on some of that, and report both."""
    rng = np.random.default_rng(seed)
    event, reports = seed << 32, 0
    logged = _rows(story)
    with open_channel(story.address) as channel:
        ranking = ranking_pb2_grpc.RankingServiceStub(channel)
        activity = activity_pb2_grpc.ActivityServiceStub(channel)
        impressions = impressions_pb2_grpc.ImpressionServiceStub(channel)
        for user in rng.integers(1, USERS + 1, count).tolist():
            pins = rng.choice(np.arange(1, PINS + 1), CANDIDATES, replace=False).tolist()
            request = ranking_pb2.RankRequest(user_id=user, pin_ids=pins, surface="home", explain=True)
            answer = ranking.Rank(request, timeout=20)
            heads = list(answer.explanation.heads)
            probable = np.reshape(answer.explanation.head_probabilities, (CANDIDATES, len(heads)))
            seen = rng.random(CANDIDATES) < discounts(CANDIDATES)
            acted = seen[:, None] & (rng.random(probable.shape) < probable)
            now_ms = time.time_ns() // 1_000_000
            actions = [
                activity_pb2.Action(
                    event_id=(event := event + 1), user_id=user, pin_id=answer.pin_ids[k], action=heads[h],
                    surface="home", time_ms=now_ms, request_id=answer.request_id, position=k,
                )
                for k, h in np.argwhere(acted).tolist()
            ]  # fmt: skip
            if actions:
                activity.Record(activity_pb2.RecordRequest(actions=actions), timeout=20)
            if seen.any():
                report = impressions_pb2.SeenRequest(
                    request_id=answer.request_id, positions=np.flatnonzero(seen).tolist(), user_id=user
                )
                impressions.Seen(report, timeout=20)
                reports += 1
    _wait_for(story, {"impressions": logged["impressions"] + count, "seen": logged["seen"] + reports})
    story.lines.append(f"  ... {count} requests are answered, and users act on what they see ...")


def _rows(story: Story) -> dict[str, int]:
    """Return how many rows the log has by table; none if the server has not written any yet."""
    log = story.folder / "log"
    tables = ("impressions", "seen")
    if not any((log / "spool").glob("*.arrows")) and not any((log / "impressions").glob("*/*.parquet")):
        return dict.fromkeys(tables, 0)
    return {table: sum(part.num_rows for part in read_tables(str(log), table)) for table in tables}


def _wait_for(story: Story, rows: dict[str, int]) -> None:
    """Wait until the server has written so many rows. Raises TimeoutError."""
    until_s = time.monotonic() + 30
    while _rows(story) != rows:
        if time.monotonic() > until_s:
            raise TimeoutError(f"the log has {_rows(story)} rows, expected {rows}")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A doubly robust estimate by positions, with its 95% interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(found: Mapping[str, float]) -> _Estimate:
        return _Estimate(found["value"], found["low"], found["high"])

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def agrees(self, other: _Estimate) -> bool:
        """Say whether another estimate, of other requests, is no further away than four standard errors."""
        own, others = (one.high - one.low for one in (self, other))
        return abs(self.value - other.value) <= 4 * math.hypot(own, others) / (2 * 1.96)


def _estimates(path: Path, reward: str) -> dict[str, _Estimate]:
    """Return the value, the baseline and the difference of a file of `pinrank explore evaluate --json`."""
    found = json.loads(path.read_text())
    forecasts = next(unit for unit in found["units"] if unit["unit"] == "positions")["forecasts"][reward]
    one = next(forecast for forecast in forecasts if forecast["estimator"] == "dr")
    return {name: _Estimate.of(one[name]) for name in ("value", "baseline", "difference")}


def closed_loop() -> list[str]:
    """Log, join, tune, forecast, publish, guard, promote, and compare the outcome with the forecast.

    Raises AssertionError if the log says that creators lose, or if the outcome is far from the forecast.
    """
    with story_of(_SETTINGS, {"explore.toml": EXPLORE}) as (story, _):
        story.say("Version 7 explores other weights of the creator, and the server logs what it answers.")
        visits(story, 3_000, seed=1)
        story.run("impressions", "join", "log", "--window", "30m", "--out", "joined")
        story.say("Creators should get 4% more, at the least cost to pinners.")
        story.run(
            "tune", "--model", "ml1m@7", "--store", "models", "--on", "joined", "--surface", "home",
            "--maximise", "pinner", "--at-least", "creator=+4%", "--out", "tuned.toml",
        )  # fmt: skip
        story.say("What would these weights have earned, by what users really did?")
        story.run(
            "explore", "evaluate", "--on", "joined", "--policy", "tuned.toml", "--against", "stable", "--store",
            "models", "--unit", "positions", "--reward", "creator", "--reward", "pinner", "--json", "forecast.json",
        )  # fmt: skip
        gain = _estimates(story.folder / "forecast.json", "creator")["difference"]
        assert gain.high > 0, f"creators gain {gain}"  # noqa: S101
        story.say(
            f"By the log, creators gain {gain}. A canary may try it; its guard watches that they get their theta."
        )
        story.run("model", "retune", "ml1m", "7", "--utility", "tuned.toml", "--label", "canary", "--by", "anna")
        story.run("model", "traffic", "ml1m", "canary", "50", "--by", "anna")
        story.wait(phase(8, "serving"))
        visits(story, 600, seed=2)
        status = re.sub(r"[│\s]+", " ", story.run("model", "status"))
        assert "healthy: " in status, status  # noqa: S101
        assert "creator on home" in status, status  # noqa: S101
        story.run("model", "label", "ml1m", "stable", "8", "--by", "anna", "--why", "creators +4%")
        story.wait(phase(7, "gone"))
        visits(story, 2_000, seed=3)
        story.say("What did they earn?")
        story.run("impressions", "join", "log", "--window", "30m", "--out", "after")
        story.run(
            "explore", "evaluate", "--on", "after", "--model", "ml1m@8", "--policy", "stable", "--against", "logged",
            "--store", "models", "--unit", "positions", "--reward", "creator", "--reward", "pinner", "--json",
            "outcome.json",
        )  # fmt: skip
        for party in ("creator", "pinner"):
            forecast = _estimates(story.folder / "forecast.json", party)
            outcome = _estimates(story.folder / "outcome.json", party)["value"]
            assert forecast["value"].agrees(outcome), f"{party}: {forecast['value']}, but {outcome}"  # noqa: S101
            story.say(f"{party}: {forecast['baseline']} before, forecast {forecast['value']}, outcome {outcome}")
        return story.lines


if __name__ == "__main__":
    print("\n".join(closed_loop()))
