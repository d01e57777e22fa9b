"""What an answer says of itself, by name, read from `v1/ranking.proto`: its stages, and the ways it is degraded."""

from __future__ import annotations

from pinrank.v1 import ranking_pb2

#: The stages of a request, in the order of `StageTimings`: `fetch` is its field `fetch_us`. The total is not a stage.
STAGES = tuple(
    stage
    for field in ranking_pb2.StageTimings.DESCRIPTOR.fields
    if (stage := field.name.removesuffix("_us")) != "total"
)
#: The fields of `Degradation`.
DEGRADATIONS = tuple(field.name for field in ranking_pb2.Degradation.DESCRIPTOR.fields)
