"""What the measurements of `published_rankers` say: tables by dataset, and a claim for each published ranker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.engines.fusion_latency import DEFAULT
from bench.harness import Claim, Conclusion, Raw, markdown_table
from ranker.baselines.scores import TREES

_ABOUT = """# DCN-v2, DIN and SASRec beside our default variant and boosted trees

HIT@3 in each head's own order, of the same candidates of the same requests. In brackets: the 95% interval of the
relative difference, over users. `bench/rankers/published_rankers.py` says where the modules deviate from the papers.
"""


def conclude(raw: Raw) -> Conclusion:
    summary: dict[str, float | None] = {}
    claims: list[Claim] = []
    tables = [_ABOUT]
    for name, measured in raw["datasets"].items():
        over, fair = measured["over_percent"], measured["rankers"][DEFAULT]["same_rows"]
        for ranker in (ranker for ranker in measured["rankers"] if ranker != DEFAULT):
            for rival in (rival for rival in (DEFAULT, TREES) if ranker in over[rival]):
                summary[f"{name}, {ranker}, HIT@3 over {rival}, mean of heads %"] = _mean(over[rival][ranker])
            claims.append(
                Claim(
                    f"{name}: HIT@3 of {ranker} over `{DEFAULT}`, mean of heads",
                    _mean(over[DEFAULT][ranker]) if fair else None, 0.0, "%", "at_most",
                    f"`{DEFAULT}` of `lift` learned from other rows; train it again",
                )
            )  # fmt: skip
        tables += _tables(name, measured)
    tables.append(_parity(raw["recbole"]))
    return Conclusion(summary, tuple(claims), "\n".join(tables))


def _mean(by_head: Mapping[str, Mapping[str, float | None]]) -> float | None:
    """Return the mean of the estimates' values over the heads that have one."""
    values = [estimate["value"] for estimate in by_head.values() if estimate["value"] is not None]
    return float(np.mean(values)) if values else None


def _tables(name: str, measured: Mapping[str, Any]) -> list[str]:
    heads, hits = list(measured["heads"]), measured["hit_at_3"]
    asked = f"{measured['requests']:,} requests, {measured['without_history']:,} without an earlier action"
    found = [
        markdown_table(
            f"{name}: HIT@3, {asked}",
            ["ranker", *heads, "trainable parameters", "training, s"],
            [
                [scorer, *(_value(hits[scorer].get(head), "{:.3f}") for head in heads), *_cost(measured, scorer)]
                for scorer in hits
            ],
        )
    ]
    for rival, over in measured["over_percent"].items():
        if over:
            rows = [
                [scorer, *(_lift(by_head.get(head)) for head in heads), _value({"value": _mean(by_head)}, "{:+.1f}%")]
                for scorer, by_head in over.items()
            ]
            found.append(markdown_table(f"{name}: over {rival}", ["ranker", *heads, "mean of heads"], rows))
    if not measured["rankers"][DEFAULT]["same_rows"]:
        found.append(f"`{DEFAULT}` learned from other rows than the others; train it again with `lift`.\n")
    return [*found, f"{measured['unknown_share']:.0%} of the candidates with an action are pins without an id.\n"]


def _cost(measured: Mapping[str, Any], scorer: str) -> tuple[str, str]:
    known = measured["rankers"].get(scorer, {})
    parameters, seconds = known.get("parameters"), known.get("seconds")
    return "-" if parameters is None else f"{parameters:,}", "-" if seconds is None else f"{seconds:.0f}"


def _value(estimate: Mapping[str, float | None] | None, form: str) -> str:
    return "-" if estimate is None or estimate["value"] is None else form.format(estimate["value"])


def _lift(estimate: Mapping[str, float | None] | None) -> str:
    if estimate is None or estimate["low"] is None:
        return _value(estimate, "{:+.1f}%")
    return f"{estimate['value']:+.1f}% [{estimate['low']:+.1f}, {estimate['high']:+.1f}]"


def _parity(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "RecBole was not installed, so its modules were not compared with.\n"
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    rows = [[part, f"{difference:.1e}"] for part, difference in found["largest_differences"].items()]
    return markdown_table(
        f"Beside RecBole's modules with the same weights ({versions})", ["part", "largest difference"], rows
    )
