"""Parses and validates Rank requests, and serialises their answers. An error lists all problems of a request."""

from __future__ import annotations

import ctypes
import math
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from kernels.native.library import address, library_if_built
from model_store.bundle.golden import QUERY_NORM_RATIO_MAX
from pinrank.v1 import ranking_pb2
from server.api.status import listed
from server.config import ServerConfig
from server.errors import FieldViolation, InvalidRequestError
from server.request.pipeline import Ranking, RankQuery
from server.request.routing import ServedModel, ServedModels

_SHOWN_MAX = 60
_PIN_IDS = ranking_pb2.RankRequest.PIN_IDS_FIELD_NUMBER
#: Odd and random, so that nobody can choose ids of which many collide.
_MULTIPLIER = secrets.randbits(64) | 1
#: Tags: the number of a field times eight, plus 2 for a length or 0 for a number.
_TIMINGS = ranking_pb2.RankResponse.DESCRIPTOR.fields_by_name["timings"].number << 3 | 2
#: The field `request_id`: its tag (the number times eight, plus 1 for eight bytes), and its value.
_REQUEST_ID = struct.Struct("<BQ")
_REQUEST_ID_TAG = ranking_pb2.RankResponse.DESCRIPTOR.fields_by_name["request_id"].number << 3 | 1
_STAGES = {field.name.removesuffix("_us"): field.number << 3 for field in ranking_pb2.StageTimings.DESCRIPTOR.fields}


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A RankRequest of valid bytes.

    Attributes:
        message: all its fields; but `pin_ids` may be empty, and only `pin_ids` below counts.
        pin_ids: uint64[N], the candidates.
        distinct: whether all of them differ.
    """

    message: ranking_pb2.RankRequest
    pin_ids: np.ndarray
    distinct: bool


def parse_request(content: bytes) -> ParsedRequest:
    """Parse a RankRequest. Raises InvalidRequestError if the bytes cannot be parsed.

    The native library reads the candidates' ids, without an object for each of them, and protobuf the other fields.
    """
    read_ids = _native()
    if read_ids is not None:
        pin_ids, places = np.empty(len(content) // 8, np.uint64), (ctypes.c_int64 * 3)()
        count = read_ids(content, len(content), _PIN_IDS, _MULTIPLIER, address(pin_ids), places)
        if count >= 0:
            start, stop, equal = places
            return ParsedRequest(_message(content[:start] + content[stop:]), pin_ids[:count], not equal)
    message = _message(content)
    listed_ids = list(message.pin_ids)
    return ParsedRequest(message, np.array(listed_ids, np.uint64), len(set(listed_ids)) == len(listed_ids))


def _message(content: bytes) -> ranking_pb2.RankRequest:
    try:
        return ranking_pb2.RankRequest.FromString(content)
    except DecodeError as error:
        violation = FieldViolation("", f"cannot parse the request as pinrank.v1.RankRequest: {error}")
        raise InvalidRequestError([violation]) from error


@cache
def _native() -> Callable[..., int] | None:
    """Return the native function that reads ids, or None if it is not built."""
    native = library_if_built()
    if native is None:
        return None
    word, place = ctypes.c_int64, ctypes.c_void_p
    takes: tuple[Any, ...] = (ctypes.c_char_p, word, ctypes.c_uint32, ctypes.c_uint64, place, place)
    # It takes a microsecond, so it keeps the interpreter lock.
    return ctypes.PYFUNCTYPE(word, *takes)(("pinrank_read_ids", native))


def to_query(
    parsed: ParsedRequest,
    models: ServedModels,
    config: ServerConfig,
    now_s: float,
    remaining_s: float | None,
) -> RankQuery:
    """Validate a request against the served models and the server's limits.

    Args:
        parsed: the parsed message.
        models: the served models.
        config: the limits and each surface's default deadline.
        now_s: `time.monotonic()` when the request arrived.
        remaining_s: seconds until the call's gRPC deadline; None if it has none.

    Raises:
        InvalidRequestError: lists every invalid field.
    """
    request, problems = parsed.message, list[FieldViolation]()
    label = _label(request, models)
    served = _served(request, label, models, problems)
    _check_pin_ids(parsed, config.candidates_max, problems)
    manifest = (served or models.default).model.manifest
    surface = next((s for s in manifest.surfaces if s.name == request.surface), None)
    if surface is None:
        known = listed(s.name for s in manifest.surfaces)
        problems.append(
            FieldViolation("surface", f"unknown surface {_shown(request.surface)}; {manifest.ref} ranks {known}")
        )
    query_pin_id, query_vector = _query(request, served or models.default, problems)
    if surface is not None and surface.query and not request.HasField("query"):
        problems.append(
            FieldViolation("query", f"surface {surface.name!r} ranks against a query; set pin_id or embedding")
        )
    if problems or served is None or surface is None:
        raise InvalidRequestError(problems)
    settings = config.surface(surface.name)
    budget_s = settings.deadline_ms / 1e3 if remaining_s is None else remaining_s
    cheaper = None
    if settings.cheaper_label and request.WhichOneof("model") != "version":  # another version must not answer it
        cheaper = models.by_label.get(settings.cheaper_label)
    return RankQuery(
        user_id=request.user_id,
        pin_ids=parsed.pin_ids,
        surface=surface.name,
        lane=surface.name,
        label=label,
        query_pin_id=query_pin_id,
        query_vector=query_vector,
        served=served,
        cheaper=cheaper if cheaper is not served else None,
        top_k=request.top_k,
        explain=request.explain,
        deadline_s=now_s + budget_s,
    )


def _label(request: ranking_pb2.RankRequest, models: ServedModels) -> str:
    match request.WhichOneof("model"):
        case "label":
            return request.label
        case "version":
            return ""
        case _:
            return models.assigned(request.surface, request.user_id)


def _served(
    request: ranking_pb2.RankRequest, label: str, models: ServedModels, problems: list[FieldViolation]
) -> ServedModel | None:
    if label or request.WhichOneof("model") == "label":
        if served := models.by_label.get(label):
            return served
        known = listed(models.by_label)
        problems.append(FieldViolation("label", f"unknown label {_shown(label)}; this server serves {known}"))
    else:
        if served := models.by_version.get(request.version):
            return served
        known = listed(sorted(models.by_version))
        problems.append(
            FieldViolation("version", f"version {request.version} is not served; this server serves {known}")
        )
    return None


def _check_pin_ids(parsed: ParsedRequest, candidates_max: int, problems: list[FieldViolation]) -> None:
    count = len(parsed.pin_ids)
    if count == 0:
        problems.append(FieldViolation("pin_ids", "no candidates; send at least one pin id"))
    elif count > candidates_max:
        problems.append(
            FieldViolation(
                "pin_ids", f"{count} candidates; this server accepts at most {candidates_max} (candidates_max)"
            )
        )
    elif not parsed.distinct:
        distinct, counts = np.unique(parsed.pin_ids, return_counts=True)
        repeated = distinct[counts > 1][:3].tolist()
        problems.append(
            FieldViolation(
                "pin_ids", f"{count - len(distinct)} duplicate ids, for example {repeated}; send each pin once"
            )
        )


def _query(
    request: ranking_pb2.RankRequest, served: ServedModel, problems: list[FieldViolation]
) -> tuple[int | None, np.ndarray | None]:
    if not request.HasField("query"):
        return None, None
    manifest = served.model.manifest
    space = manifest.query_space
    if space is None:
        problems.append(FieldViolation("query", f"model {manifest.ref} does not read a query; omit it"))
        return None, None
    match request.query.WhichOneof("kind"):
        case "pin_id":
            return request.query.pin_id, None
        case "embedding":
            embedding = request.query.embedding
        case _:
            problems.append(FieldViolation("query", "the query is empty; set pin_id or embedding, or omit the query"))
            return None, None
    if embedding.space != space.ref:
        problems.append(
            FieldViolation(
                "query.embedding.space", f"space {_shown(embedding.space)}; {manifest.ref} reads {space.ref!r}"
            )
        )
    vector = np.array(embedding.values, np.float32)
    if len(vector) != space.dim:
        problems.append(
            FieldViolation("query.embedding.values", f"{len(vector)} values; {space.ref} has {space.dim} dimensions")
        )
    if not np.isfinite(vector).all():
        position = int(np.argmin(np.isfinite(vector)))
        problems.append(FieldViolation(f"query.embedding.values[{position}]", f"{vector[position]} is not finite"))
    elif (norm := math.sqrt(vector.astype(np.float64) @ vector.astype(np.float64))) > served.model.query_norm_max:
        problems.append(
            FieldViolation(
                "query.embedding.values",
                f"the vector's Euclidean norm is {norm:.6g}; {manifest.ref} takes at most "
                f"{served.model.query_norm_max:.6g}, {QUERY_NORM_RATIO_MAX:g} times the longest vector of {space.ref} "
                "that it knows; send a vector of that space, in its units",
            )
        )
    return None, vector


def _shown(text: str) -> str:
    """Quote a caller's text, cut to `_SHOWN_MAX` characters: the status travels in headers, whose size is limited."""
    return repr(text) if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]!r}... ({len(text)} characters)"


def to_response(query: RankQuery, ranking: Ranking, wire_us: int, total_us: int) -> bytes:
    """Serialise the answer.

    A message's fields may come in any order, and serialised parts of it may be concatenated (protobuf encoding, "Last
    One Wins"). So the long fields come packed with the scores, and the versions are serialised once per model.
    """
    scores = ranking.scores
    parts: list[bytes | memoryview] = [
        scores.packed,
        ranking.served.versions,
        _timings(
            {"wire": wire_us, **{stage: round(s * 1e6) for stage, s in ranking.stage_s.items()}, "total": total_us}
        ),
    ]
    if query.request_id:
        parts.append(_REQUEST_ID.pack(_REQUEST_ID_TAG, query.request_id))
    if ranking.degradation:
        degradation = ranking_pb2.Degradation(**ranking.degradation)  # type: ignore[arg-type]
        parts.append(ranking_pb2.RankResponse(degradation=degradation).SerializeToString())
    explored = ranking.explored
    if explored is not None:
        exploration = ranking_pb2.Exploration(arm=explored.arm)
        parts.append(ranking_pb2.RankResponse(exploration=exploration).SerializeToString())
    if query.explain:
        order, table = scores.order, ranking.served.utility.surfaces[query.surface]
        weights = table.weights if explored is None else explored.party_weights
        explanation = ranking_pb2.Explanation(
            heads=[head.name for head in ranking.served.model.manifest.heads],
            head_probabilities=scores.probabilities[order].ravel().tolist(),
            parties=table.parties,
            party_utilities=scores.party_utilities[order].ravel().tolist(),
            party_weights=weights.tolist(),
        )
        parts.append(ranking_pb2.RankResponse(explanation=explanation).SerializeToString())
    return b"".join(parts)


def _timings(stage_us: Mapping[str, int]) -> bytes:
    """Serialise a response with only its `timings`; with protobuf's messages it takes twice as long."""
    content = [_TIMINGS, 0]
    for stage, us in stage_us.items():
        if us:
            content.append(_STAGES[stage])
            left = us
            while left > 0x7F:
                content.append(left & 0x7F | 0x80)
                left >>= 7
            content.append(left)
    content[1] = len(content) - 2  # a few bytes for each stage: the length fits into one
    return bytes(content)
