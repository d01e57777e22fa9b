"""The models a server answers with, by label and by version."""

from __future__ import annotations

from collections.abc import Mapping

from model_store.live import LiveModel
from model_store.utility import UtilityTable
from pinrank.v1 import ranking_pb2


class Served:
    """A live model with the utility table compiled for it, and what its answers say of their origin."""

    def __init__(self, live: LiveModel, utility: UtilityTable) -> None:
        self.live = live
        self.utility = utility
        manifest = live.manifest
        groups = [*manifest.groups, *([manifest.sequence] if manifest.sequence else [])]
        #: A response with nothing but its versions, serialised: the same in every answer.
        self.versions: bytes = ranking_pb2.RankResponse(
            versions=ranking_pb2.Versions(
                model=manifest.name,
                model_version=manifest.version,
                model_digest=live.digest,
                utility=utility.digest,
                feature_groups=[group.ref for group in groups],
            )
        ).SerializeToString()


class ServedModels:
    """Which model answers a request. The first label is the default."""

    def __init__(self, by_label: Mapping[str, Served]) -> None:
        if not by_label:
            raise ValueError("a server serves at least one label")
        self.by_label = dict(by_label)
        self.by_version = {served.live.manifest.version: served for served in by_label.values()}
        self.default = next(iter(by_label.values()))
        #: Every surface that some model ranks.
        self.surfaces = frozenset(s.name for served in by_label.values() for s in served.live.manifest.surfaces)
