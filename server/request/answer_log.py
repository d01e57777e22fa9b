"""Hands answers, recorded actions and reports to the impression log, in a few microseconds each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from feature_client.features import FetchedFeatures
from impressions.writing.log import ImpressionLog
from impressions.writing.rows import AnsweredRequest, Constants, Exploring, RecordedAction, RecordedActions, SeenReport
from model_store.bundle.golden import GoldenRequest, encode_golden
from model_store.exploration.hashing import mixed
from pinrank.v1 import activity_pb2
from server.request.pipeline import Ranking, RankQuery
from server.request.routing import ServedModel
from server.request.scoring import Scores

_ALL = 1 << 64
#: So that the answers that are logged, and those that keep their features, are chosen independently of exploration.
_LOGGED, _WITH_FEATURES = 0x6C6F67, 0x66656174


class AnswerLog:
    """Writes what a server answers into an impression log. Belongs to one event loop."""

    def __init__(self, log: ImpressionLog, share: float, features_share: float) -> None:
        """Create for a log.

        Args:
            log: its owner runs its threads and closes it.
            share: the part of the answers to log, chosen by their ids.
            features_share: the part of those that keep the stored rows that were read.
        """
        self._log = log
        self._share, self._features_share = int(share * _ALL), int(features_share * _ALL)
        #: What answers of a model have in common, by surface. It does not keep models that are served no more.
        self._constants: WeakKeyDictionary[ServedModel, dict[str, Constants]] = WeakKeyDictionary()

    def answered(self, query: RankQuery, ranking: Ranking, now_ms: int) -> None:
        """Log an answer; the log counts those that it drops."""
        request_id = query.request_id
        if mixed(request_id ^ _LOGGED) >= self._share:
            return
        served, scores, fetched = ranking.served, ranking.scores, ranking.fetched
        table = served.utility.surfaces[query.surface]
        attributes = served.utility.attributes
        values = np.empty((len(attributes), scores.scored))
        for column, attribute in zip(values, attributes, strict=True):
            column[:] = fetched.candidate_rows(attribute.group)[attribute.field]
        keeps_features = self._features_share and mixed(request_id ^ _WITH_FEATURES) < self._features_share
        self._log.offer_impression(
            AnsweredRequest(
                request_id=request_id,
                time_ms=now_ms,
                user_id=query.user_id,
                label=query.label,
                constants=self._constants_of(served, query.surface),
                degradation=ranking.degradation,
                party_weights=table.weights if ranking.explored is None else ranking.explored.party_weights,
                pin_ids=query.pin_ids,
                scores=scores,
                attribute_values=values,
                query_pin_id=query.query_pin_id,
                query_vector=query.query_vector,
                exploring=_exploring(ranking),
                features=partial(_features, fetched, query.surface, scores) if keeps_features else None,
                features_bytes=served.model.bytes_of(len(query.pin_ids)) if keeps_features else 0,
            )
        )

    def recorded(self, actions: Sequence[activity_pb2.Action], now_ms: int) -> None:
        """Log actions that were stored. They must not change any more."""
        self._log.offer_actions(RecordedActions(len(actions), partial(_rows, actions, now_ms)))

    def seen(self, request_id: int, now_ms: int, positions: np.ndarray, user_id: int | None) -> bool:
        """Log a report, uint32[S]; return False if the queue is full."""
        return self._log.offer_seen(SeenReport(request_id, now_ms, positions, user_id))

    def _constants_of(self, served: ServedModel, surface: str) -> Constants:
        of_model = self._constants.setdefault(served, {})
        known = of_model.get(surface)
        if known is not None:
            return known
        manifest, utility = served.model.manifest, served.utility
        made = of_model[surface] = Constants(
            surface,
            manifest.ref,
            served.model.digest,
            utility.digest,
            utility.heads,
            utility.surfaces[surface].parties,
            tuple(attribute.name for attribute in utility.attributes),
        )
        return made


def _exploring(ranking: Ranking) -> Exploring | None:
    exploration, explorer = ranking.served.exploration, ranking.explorer
    if explorer is None or exploration is None:
        return None
    arm = None if ranking.explored is None else ranking.explored.arm
    return Exploring(exploration.digest, exploration.seed, arm, explorer)


def _features(fetched: FetchedFeatures, surface: str, scores: Scores) -> bytes:
    """Encode the rows that were read, as golden requests keep them, with the probabilities of the scored candidates."""
    return encode_golden([GoldenRequest(fetched, surface, scores.probabilities[: scores.scored])])


def _rows(actions: Sequence[activity_pb2.Action], received_ms: int) -> Iterator[RecordedAction]:
    for a in actions:
        position = a.position if a.HasField("position") else None
        yield RecordedAction(
            a.event_id, a.user_id, a.pin_id, a.action, a.surface, a.time_ms, received_ms, a.request_id or None, position
        )
