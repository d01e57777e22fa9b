"""Compares every label's model with the default label's, and blocks versions that were rolled back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from server.config import ServerConfig
from server.request.routing import ServedModels
from server.rollout.guard import Breach, Healthy, Limits, Verdict, judge
from server.rollout.party_guard import compared, judge_parties, theta_note

#: Interval between comparisons.
EVERY_S = 1.0


class LabelGuard:
    """Compares every label with the default one. Belongs to one event loop.

    Attributes:
        verdicts: the latest verdict, by label.
    """

    def __init__(self, config: ServerConfig, models: ServedModels, clock: Callable[[], float]) -> None:
        guard = config.guard
        self._limits = Limits(guard.requests_min, guard.error_rate_max, guard.p99_ratio_max, guard.psi_max)
        self._party_loss_max = guard.party_loss_max
        self._shadow_label = config.shadow.label
        self._models = models
        self._clock = clock
        self.verdicts: dict[str, Verdict] = {}
        #: By label, the version that was rolled back; kept while the store still names it.
        self._blocked: dict[str, int] = {}

    async def breaches(self) -> list[tuple[str, int, str]]:
        """Judge every label; return (label, version, reason) for each one to roll back."""
        now_s, found = self._clock(), []
        models, default = self._models, self._models.default
        for label, served in list(models.by_label.items()):
            if served is default or label == self._shadow_label:
                continue
            own, usual = (models.windows[name].seen(now_s) for name in (label, models.default_label))
            moved = await asyncio.to_thread(served.heads_moved, default)
            if models.by_label.get(label) is not served:
                continue
            verdict = judge(own, usual, moved, self._limits)
            if isinstance(verdict, Healthy):
                parties = compared(own.parties, usual.parties, served.utility, default.utility)
                least = self._limits.requests_min
                thetas = theta_note(parties, least)
                healthy = Healthy(f"{verdict.note}, {thetas}") if thetas else verdict
                verdict = judge_parties(parties, least, self._party_loss_max) or healthy
            self.verdicts[label] = verdict
            if isinstance(verdict, Breach):
                found.append((label, served.version, verdict.reason))
        return found

    def block(self, label: str, version: int) -> None:
        """Keep a version off a label until the store names another version for it."""
        self._blocked[label] = version

    def blocks(self, label: str, version: int) -> bool:
        return self._blocked.get(label) == version

    def follow(self, labels: Mapping[str, int]) -> None:
        """Unblock the versions that the store no longer names."""
        self._blocked = {label: version for label, version in self._blocked.items() if labels.get(label) == version}
