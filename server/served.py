"""The models a server answers with, by label and by version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model_store.live import LiveModel
from server.utility import UtilityTable


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A live model with the utility table compiled for it."""

    live: LiveModel
    utility: UtilityTable


class ServedModels:
    """Which model answers a request. The first label is the default."""

    def __init__(self, by_label: Mapping[str, Served]) -> None:
        if not by_label:
            raise ValueError("a server serves at least one label")
        self.by_label = dict(by_label)
        self.by_version = {served.live.manifest.version: served for served in by_label.values()}
        self.default = next(iter(by_label.values()))
