"""Compares a shadow model version with those that serve, by ranking some answered requests again with it."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import replace

import numpy as np

from model_store.bundle.stability import moved_by
from pinrank.v1 import models_pb2
from server.errors import OverloadedError, RankError
from server.request.pipeline import Pipeline, Ranking, RankQuery
from server.request.routing import ServedModel, ServedModels
from server.runtime.supervisor import Supervisor
from server.runtime.tasks import BackgroundTasks

#: The scheduling lane of shadow requests, which get only the time that other lanes leave.
SHADOW_LANE = "(shadow)"
_DEADLINE_S = 1.0
_AT_ONCE = 2
_KEPT = 256
_TOP = 10


class Shadow:
    """Compares the shadow label's rankings with the ones that callers received. Belongs to one event loop."""

    def __init__(
        self, models: ServedModels, pipeline: Pipeline, label: str, share: float, supervisor: Supervisor
    ) -> None:
        self._models = models
        self._pipeline = pipeline
        self._label = label
        self._share = share
        self._supervisor = supervisor
        self._random = random.Random()
        self._tasks = BackgroundTasks()
        self._served: ServedModel | None = None
        self._begin(None)

    def _begin(self, served: ServedModel | None) -> None:
        """Discard all counts, and compare this version from now on."""
        self._served = served
        self.requests = self.skipped = self.failed = 0
        self._overlaps: deque[float] = deque(maxlen=_KEPT)
        #: By head, the probabilities of the given answers and the shadow's, in request order.
        self._heads: dict[str, tuple[deque[np.ndarray], deque[np.ndarray]]] = {}

    def offer(self, query: RankQuery, ranking: Ranking) -> None:
        """Maybe rank an answered request again: only a share of them, and a few at once."""
        served = self._models.by_label.get(self._label)
        if served is not self._served:
            self._begin(served)
        if served is None or served is ranking.served or self._random.random() >= self._share:
            return
        if len(self._tasks) >= _AT_ONCE:
            self.skipped += 1
            return
        again = replace(
            query,
            served=served,
            cheaper=None,
            lane=SHADOW_LANE,
            label=self._label,
            top_k=0,
            deadline_s=time.monotonic() + _DEADLINE_S,
            caller="",
        )
        if query.surface not in served.utility.surfaces:
            return
        self._tasks.start(self._supervisor.task("shadow", self._compare(again, ranking)))

    @property
    def comparing(self) -> int:
        """How many requests are being ranked again."""
        return len(self._tasks)

    async def close(self) -> None:
        await self._tasks.cancel()

    async def _compare(self, query: RankQuery, given: Ranking) -> None:
        try:
            own = await self._pipeline.rank(query)
        except OverloadedError:
            self.skipped += 1
            return
        except RankError:
            self.failed += 1
            return
        except Exception:
            self.failed += 1
            raise  # a bug; the supervisor reports it
        if query.served is not self._served:  # the label moved while the request was ranked
            return
        self.requests += 1
        best = min(_TOP, given.scores.top)
        self._overlaps.append(len(np.intersect1d(given.scores.order[:best], own.scores.order[:best])) / best)
        theirs = {head.name: i for i, head in enumerate(given.served.model.manifest.heads)}
        for i, head in enumerate(query.served.model.manifest.heads):
            if head.name in theirs:
                kept = self._heads.setdefault(head.name, (deque(maxlen=_KEPT), deque(maxlen=_KEPT)))
                kept[0].append(given.scores.probabilities[:, theirs[head.name]].copy())
                kept[1].append(own.scores.probabilities[:, i].copy())

    def status(self) -> models_pb2.ShadowStatus:
        """Return the results of the comparison so far."""
        found = models_pb2.ShadowStatus(
            version=self._served.version if self._served else 0,
            requests=self.requests,
            skipped=self.skipped,
            failed=self.failed,
            top_10_overlap=float(np.mean(self._overlaps)) if self._overlaps else 0.0,
        )
        for head, kept in self._heads.items():
            given, own = (np.concatenate(list(values)) for values in kept)
            found.heads.add(
                head=head, mean=float(np.nanmean(given)), shadow_mean=float(np.nanmean(own)), psi=moved_by(own, given)
            )
        return found
