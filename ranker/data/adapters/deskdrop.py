"""DeskDrop: what the readers of a company's portal did with articles, one line per step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ranker.data.adapters.conversion import Adapter, Signs, sign_rule
from ranker.data.adapters.source_table import read_table
from ranker.data.schema import ActionSchema

_DESKDROP_EVENTS = {
    "VIEW": "view",
    "LIKE": "like",
    "BOOKMARK": "bookmark",
    "FOLLOW": "follow",
    "COMMENT CREATED": "comment",
}


def _deskdrop(source: Path) -> Signs:
    rows = read_table(source, ",", ("timestamp", "eventType", "contentId", "personId"))
    kinds = tuple(_DESKDROP_EVENTS)
    for row in rows:
        if row["eventType"] not in kinds:
            raise row.fault("eventType", f"it must be one of {', '.join(kinds)}")
    kind = np.array([kinds.index(row["eventType"]) for row in rows], np.int64)
    return Signs(
        users=[row.identifier("personId") for row in rows],
        pins=[row.identifier("contentId") for row in rows],
        time_ms=np.array([row.time_ms("timestamp", 1000) for row in rows], np.int64),
        names=tuple(_DESKDROP_EVENTS.values()),
        shown=kind[:, None] == np.arange(len(kinds)),
    )


#: Articles on a company's portal, March 2016 to February 2017. Every sign counts as a closeup, because a user who
#: likes or bookmarks an article has looked at it even without a view in the same sitting.
DESKDROP = Adapter(
    "deskdrop",
    _deskdrop,
    ActionSchema(
        actions=(
            sign_rule("save", "bookmarked", "bookmark", 1.0),
            sign_rule("follow", "followed: wants to hear of new comments", "follow", 0.8),
            sign_rule("comment", "commented on", "comment", 0.8),
            sign_rule("like", "liked", "like", 0.7),
            sign_rule("closeup", "opened, or acted on in any other way", None, 0.3),
        )
    ),
)
