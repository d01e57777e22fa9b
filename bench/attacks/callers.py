"""Measure what callers with names, tokens and quotas cost: CPU time of a Rank call with a callers file, and without.

Two servers differ only in the file, which names 50 callers with quotas that are never reached. Their calls come with
the 50 tokens in turn. Both are saturated, side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.attacks.place import callers_file, place, token_of
from bench.edges.side_by_side import QUICK, Plan, Variant, compare, core_ms, over
from bench.harness import Claim, Conclusion, Raw
from bench.test_bed import CONFIG, known_median

_CALLERS = tuple(f"caller-{i}" for i in range(50))
_RIGHTS = 'may = ["rank"]\nrequests_per_s = 1e6\nrows_per_s = 1e9\n'
_CANDIDATES = 128


def measure(*, quick: bool = False, config: Path = CONFIG) -> Iterator[Raw]:
    """Run the benchmark. Raises BenchmarkError if a server does not start, or does not answer a call completely."""
    with place(config) as ground:
        named = {"callers_file": callers_file(ground.folder / "callers.toml", _CALLERS, _RIGHTS)}
        variants = {"without": Variant(), "with": Variant(named, tokens=tuple(map(token_of, _CALLERS)))}
        for rounds in compare(ground, variants, QUICK if quick else Plan(), _CANDIDATES):
            yield {"callers": len(_CALLERS), "rounds": rounds}


def conclude(raw: Raw) -> Conclusion:
    rounds = raw["rounds"]
    claims = (
        Claim(
            f"CPU time of a call with {raw['callers']} named callers, over without",
            over(rounds, "with", "without"), 1.02, "ratio", "at_most", "a round answered nothing",
        ),
    )  # fmt: skip
    summary = {
        f"{name} a callers file, core-ms a call": known_median(core_ms(rounds, name)) for name in ("with", "without")
    }
    return Conclusion(summary, claims)
