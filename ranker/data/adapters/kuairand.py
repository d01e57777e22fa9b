"""An extract of KuaiRand-27K: short videos that users liked or hated, one line per video shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ranker.data.adapters.conversion import Adapter, Signs, sign_rule
from ranker.data.adapters.source_table import Row, read_table
from ranker.data.schema import ActionSchema

#: Column of the extract -> sign. `label` is a separate sign: see `KUAIRAND`.
_KUAIRAND_SIGNS = {
    "is_follow": "follow",
    "is_forward": "forward",
    "is_comment": "comment",
    "is_profile_enter": "profile",
    "long_view": "long_view",
    "is_click": "click",
}


def _kuairand(source: Path) -> Signs:
    rows = read_table(source, "\t", ("user_id", "video_id", "time_ms", "label", *_KUAIRAND_SIGNS))
    label = _zero_or_one(rows, "label")
    return Signs(
        users=[row.identifier("user_id") for row in rows],
        pins=[row.identifier("video_id") for row in rows],
        time_ms=np.array([row.time_ms("time_ms", 1) for row in rows], np.int64),
        names=("hate", "like", *_KUAIRAND_SIGNS.values()),
        shown=np.stack([~label, label, *(_zero_or_one(rows, name) for name in _KUAIRAND_SIGNS)], axis=-1),
    )


def _zero_or_one(rows: Sequence[Row], column: str) -> np.ndarray:
    for row in rows:
        if row[column] not in {"0", "1"}:
            raise row.fault(column, "it must be 0 or 1")
    return np.array([row[column] == "1" for row in rows], bool)


#: Short videos, April 2022. The extract contains only impressions that were liked (label 1) or hated (label 0). The
#: data shows this meaning of the label: rows with label 0 have a median playing time of 4.5 s against 11.8 s, are long
#: views in 22% against 52% of cases, and led to a follow in 1 of 8,083 against 1 of 111 cases. So an impression without
#: a positive action is always a hide: a real, logged negative of the like head.
KUAIRAND = Adapter(
    "kuairand",
    _kuairand,
    ActionSchema(
        actions=(
            # First, because a hated video should be shown less, whatever else happened.
            sign_rule("hide", "said to dislike it", "hate", 0.0),
            sign_rule("follow", "followed its author", "follow", 1.0),
            sign_rule("forward", "forwarded", "forward", 1.0),
            sign_rule("like", "liked", "like", 0.8),
            sign_rule("comment", "commented on", "comment", 0.8),
            sign_rule("profile_visit", "opened its author's profile", "profile", 0.6),
            sign_rule("long_view", "watched to the end, or for 18 seconds", "long_view", 0.5),
            sign_rule("closeup", "opened", "click", 0.3),
        )
    ),
)
