"""A small log of users, and a network that was trained on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from feature_client.groups import EmbeddingSpace
from ranker.data.actions import RATINGS, ActionLog
from ranker.data.embeddings import PinEmbeddings
from ranker.embedding.users.fit import FitSettings

DAY_MS = 86_400_000
SMALL = FitSettings(dim=16, layers=2, heads=2, length_max=12, epochs=2, batch=8, rate=0.01)


def log_of(
    users: np.ndarray, pins: np.ndarray, time_ms: np.ndarray, action: np.ndarray | None = None, first_user: int = 100
) -> ActionLog:
    """Return a log of these events, in the order of their times; ids are 100 + user and 1,000 + pin."""
    order = np.argsort(time_ms, kind="stable")
    user_ids, user = np.unique(users[order] + first_user, return_inverse=True)
    pin_ids, pin = np.unique(pins[order] + 1_000, return_inverse=True)
    strongest = (np.zeros(len(users), np.uint8) if action is None else action.astype(np.uint8))[order]
    return ActionLog(
        schema=RATINGS,
        user_ids=user_ids.astype(np.uint64),
        pin_ids=pin_ids.astype(np.uint64),
        user=user,
        pin=pin,
        time_ms=time_ms[order],
        labels=np.eye(len(RATINGS.names), dtype=bool)[strongest],
        action=strongest,
        by_user=np.argsort(user, kind="stable"),
        user_splits=np.concatenate([[0], np.cumsum(np.bincount(user))]),
    )


def random_log(seed: int = 0, users: int = 40, pins: int = 30, events: int = 600, days: float = 60.0) -> ActionLog:
    """Return a log of random events; some users have more than a window of them."""
    rng = np.random.default_rng(seed)
    user = (users * rng.random(events) ** 2).astype(np.int64)
    user[:users] = np.arange(users)
    time_ms = 1_600_000_000_000 + np.sort(rng.integers(0, round(days * DAY_MS), events))
    return log_of(user, rng.integers(0, pins, events), time_ms, rng.integers(0, len(RATINGS.names), events))


def pin_vectors(log: ActionLog, dim: int = 6, seed: int = 1, *, without: int = 3) -> PinEmbeddings:
    """Return random vectors of all pins but the first ones."""
    ids = log.pin_ids[without:]
    numbers = np.random.default_rng(seed).standard_normal((len(ids), dim))
    numbers /= np.linalg.norm(numbers, axis=1, keepdims=True)
    space = EmbeddingSpace(name="given", version=1, dim=dim, content=f"{seed:016x}")
    return PinEmbeddings(ids, numbers.astype(np.float16), space)


def changed_after(log: ActionLog, time_ms: int, seed: int = 5) -> ActionLog:
    """Return a log whose events at or after a time are on other pins, and other actions."""
    rng, late = np.random.default_rng(seed), log.time_ms >= time_ms
    pin = np.where(late, rng.integers(0, len(log.pin_ids), len(log.pin)), log.pin)
    action = np.where(late, rng.integers(0, len(RATINGS.names), len(log.pin)), log.action).astype(np.uint8)
    labels = np.eye(len(RATINGS.names), dtype=bool)[action]
    return replace(log, pin=pin, action=action, labels=labels)
