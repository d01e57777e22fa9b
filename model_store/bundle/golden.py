"""Golden requests: features with their expected probabilities, kept in the bundle and scored at every load."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feature_client.codec import Rows, RowState
from feature_client.features import FetchedFeatures
from feature_client.groups import Embedding
from model_store.bundle.archives import decode_arrays
from model_store.bundle.manifest import Manifest

#: Limits on the archive. A server scores all golden requests in one run, also beside requests.
BYTES_MAX = 256 << 20
CANDIDATES_MAX = 5_000
#: How many times as long as the longest vector that the bundle shows, or as a unit vector, a caller's query may be.
#: Vectors of a space differ by far less; a caller in other units differs by more.
QUERY_NORM_RATIO_MAX = 100.0


@dataclass(frozen=True, slots=True)
class GoldenRequest:
    """The features of one request, as fetched from the store, and its expected probabilities, float32[N, H]."""

    fetched: FetchedFeatures
    surface: str
    probabilities: np.ndarray


def query_norm_max(manifest: Manifest, requests: Sequence[GoldenRequest]) -> float:
    """Return the largest Euclidean norm of a query vector that callers may send.

    The golden requests hold stored vectors of the query's space. Where they hold none, unit vectors are assumed.
    """
    space, largest = manifest.query_space, 1.0
    for group in manifest.groups:
        fields = [field for field in group.fields if isinstance(field, Embedding) and field.space == space]
        for request in requests:
            sides = request.fetched.pins if group.entity == "pin" else request.fetched.user
            for field in fields:
                vectors = sides[group.name].rows[field.name].astype(np.float64) * field.space.scale
                norms = np.linalg.norm(vectors, axis=1)
                largest = max(largest, float(np.max(norms, initial=0.0, where=np.isfinite(norms))))
    return QUERY_NORM_RATIO_MAX * largest


def encode_golden(requests: Sequence[GoldenRequest]) -> bytes:
    """Encode requests as an npz archive of plain arrays. Equal requests give equal bytes."""
    arrays: dict[str, np.ndarray] = {}
    for i, golden in enumerate(requests):
        fetched = golden.fetched
        arrays[f"{i}/surface"] = np.array(golden.surface)
        arrays[f"{i}/probabilities"] = golden.probabilities
        places = np.arange(fetched.candidates + len(fetched.events) + fetched.has_query_pin)
        arrays[f"{i}/candidate_index"] = places[: fetched.candidates]
        arrays[f"{i}/events"] = fetched.events
        arrays[f"{i}/read_ms"] = np.array(fetched.read_ms)
        arrays[f"{i}/event_index"] = places[fetched.candidates :][: len(fetched.events)]
        arrays[f"{i}/query_index"] = np.array(places[-1] if fetched.has_query_pin else -1)
        for side, groups in (("user", fetched.user), ("pins", fetched.pins)):
            for name, rows in groups.items():
                arrays[f"{i}/{side}/{name}/rows"] = rows.rows
                arrays[f"{i}/{side}/{name}/states"] = rows.states
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def decode_golden(content: bytes) -> list[GoldenRequest]:
    """Decode the output of `encode_golden`. Raises ValueError for anything else, pickles included."""
    try:
        arrays = decode_arrays(content, BYTES_MAX)
        count = len({name.split("/")[0] for name in arrays})
        candidates = sum(arrays[f"{i}/candidate_index"].size for i in range(count))
        if candidates > CANDIDATES_MAX:
            raise ValueError(f"they have {candidates:,} candidates in all, the limit is {CANDIDATES_MAX:,}")
        return [_decode_one(arrays, f"{i}/") for i in range(count)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not an archive of golden requests: {error}") from error


def _decode_one(arrays: dict[str, np.ndarray], prefix: str) -> GoldenRequest:
    def groups(side: str) -> dict[str, Rows]:
        start = f"{prefix}{side}/"
        names = {name[len(start) :].split("/")[0] for name in arrays if name.startswith(start)}
        return {n: Rows(arrays[f"{start}{n}/rows"], arrays[f"{start}{n}/states"]) for n in sorted(names)}

    # For each use of a pin, the archive holds the index of its row.
    used = [arrays[f"{prefix}candidate_index"], arrays[f"{prefix}event_index"]]
    query_index = int(arrays[f"{prefix}query_index"])
    index = np.concatenate([*used, [query_index] if query_index >= 0 else []]).astype(np.int64)
    fetched = FetchedFeatures(
        user=groups("user"),
        pins={name: Rows(rows.rows[index], rows.states[index]) for name, rows in groups("pins").items()},
        candidates=len(used[0]),
        events=arrays[f"{prefix}events"],
        has_query_pin=query_index >= 0,
        sequence_state=RowState.PRESENT,
        # Archives did not hold the time before networks read it.
        read_ms=int(arrays.get(f"{prefix}read_ms", 0)),
    )
    return GoldenRequest(fetched, str(arrays[f"{prefix}surface"]), arrays[f"{prefix}probabilities"])
