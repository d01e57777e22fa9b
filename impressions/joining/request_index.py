"""Which requests a log has, before anything but their ids, users and times is kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from impressions.dataset import JoinError
from impressions.joining.attribution import Requests
from impressions.joining.records import Span, checked

#: Why a request is left out of the dataset; the index is the code in `RequestIndex.left_out`, where 0 means it is not.
LEFT_OUT = ("", "rows that differ", "scores that are not finite")
CONTRADICTION, NOT_FINITE = 1, 2

#: The columns of impressions that the index needs.
INDEXED = ("request_id", "time_ms", "user_id")


@dataclass(frozen=True, slots=True)
class RequestIndex:
    """The requests of a log within a span.

    Attributes:
        requests: R requests, each once.
        left_out: uint8[R], position in `LEFT_OUT`; those that contradict themselves in user or time are known here.
        elsewhere: uint64[E], ascending, ids of the log's requests beyond the span.
        repeated: how many rows of the log repeat a request.
        rows: how many rows of the log belong to the R requests.
        rows_span: the times of these rows; rows that contradict others may be beyond the span.
    """

    requests: Requests
    left_out: np.ndarray
    elsewhere: np.ndarray
    repeated: int
    rows: int
    rows_span: Span


def index_requests(tables: Iterable[pa.Table], span: Span, margin_ms: int = 0) -> RequestIndex:
    """Index the requests of a log, which may have many files, in any order, with repetitions.

    Args:
        tables: the log's impressions, with the columns `INDEXED`.
        span: when the wanted requests were answered; there must be one.
        margin_ms: how long before and after the span a request is indexed, too.

    Cost: about 100 bytes a row of the log while it sorts them.

    Raises:
        JoinError: the log has no request in the span, a request has id 0, or a table is not of the log's schema.
    """
    parts = [[table[name].to_numpy() for name in INDEXED] for table in checked(tables, "impressions", INDEXED)]
    none = [np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.uint64)]
    ids, times, users = (np.concatenate(column) for column in zip(none, *parts, strict=True))
    if not len(ids):
        raise JoinError(
            "the log has no impressions; check the address, and that the server runs with `[impressions] to = ...`"
        )
    if not ids.all():
        raise JoinError("a request of the log has id 0, which no server gives; remove or repair its file")
    order = np.lexsort((users, times, ids))
    ids, users, times = ids[order], users[order], times[order]
    first = np.ones(len(ids), bool)
    first[1:] = ids[1:] != ids[:-1]
    differs = np.zeros(len(ids), bool)
    differs[1:] = ~first[1:] & ((users[1:] != users[:-1]) | (times[1:] != times[:-1]))
    contradictory = ids[differs]
    inside = span.widened(margin_ms, margin_ms).holds(times[first])
    if not span.holds(times[first]).any():
        raise JoinError(
            f"the log has no impressions between --since and --until; its requests were answered between "
            f"{np.datetime64(int(times.min()), 'ms')} and {np.datetime64(int(times.max()), 'ms')} (UTC)"
        )
    requests = Requests.of(ids[first][inside], users[first][inside], times[first][inside])
    left_out = np.isin(requests.request_ids, contradictory).astype(np.uint8) * np.uint8(CONTRADICTION)
    own = times[np.repeat(inside, np.diff(np.flatnonzero([*first, True])))]
    repeated, rows_span = len(ids) - int(np.count_nonzero(first)), Span(int(own.min()), int(own.max()) + 1)
    return RequestIndex(requests, left_out, ids[first][~inside], repeated, len(own), rows_span)
