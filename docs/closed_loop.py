"""The story of docs/closed-loop.md: from logged answers to weights that give creators more, and what came of them.

The users are simulated. How they behave is fixed here, before anything is tuned or forecast:
a user looks at position k with probability 1 / log2(k + 2), and does what the model predicts with half its probability.
"""

from __future__ import annotations

import time

import numpy as np

from docs.transcripts import CANDIDATES, PINS, USERS, Story, phase, story_of
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
[surfaces.home.arms.more_creator]
weights = { creator = 0.8 }
[surfaces.home.arms.most_creator]
weights = { creator = 1.6 }
"""
_SETTINGS = """
party_loss_max = 0.5
[impressions]
to = "file://{folder}/log"
rotate_s = 1
"""
_BELIEVED = 0.5


def visits(story: Story, count: int, seed: int) -> None:
    """Let users visit: rank, look at some of the answer, act on some of that, and report both."""
    rng = np.random.default_rng(seed)
    event = seed << 32
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
            acted = seen[:, None] & (rng.random(probable.shape) < _BELIEVED * probable)
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
                    request_id=answer.request_id, positions=np.flatnonzero(seen).tolist()
                )
                impressions.Seen(report, timeout=20)
    story.lines.append(f"  ... {count} requests are answered, and users act on what they see ...")


def closed_loop() -> list[str]:
    """Log, join, tune, forecast, publish, guard, promote, and compare the outcome with the forecast."""
    with story_of(_SETTINGS, {"explore.toml": EXPLORE}) as (story, _):
        story.say("Version 7 explores other weights of the creator, and the server logs what it answers.")
        visits(story, 1_500, seed=1)
        story.run("impressions", "join", "log", "--window", "30m", "--out", "joined")
        story.say("Creators should get 5% more, at the least cost to pinners.")
        story.run(
            "tune", "--model", "ml1m@7", "--store", "models", "--on", "joined", "--surface", "home",
            "--maximise", "pinner", "--at-least", "creator=+5%", "--out", "tuned.toml",
        )  # fmt: skip
        story.run("model", "retune", "ml1m", "7", "--utility", "tuned.toml", "--label", "canary", "--by", "anna")
        story.run("model", "traffic", "ml1m", "canary", "50", "--by", "anna")
        story.wait(phase(8, "serving"))
        visits(story, 600, seed=2)
        story.run("model", "status")
        story.run("model", "label", "ml1m", "stable", "8", "--by", "anna", "--why", "creators +5%")
        return story.lines


if __name__ == "__main__":
    print("\n".join(closed_loop()))
