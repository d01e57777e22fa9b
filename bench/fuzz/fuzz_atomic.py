"""Fuzz the RecBole reader: compare it with a slow and obviously correct one.

Both read generated files (`tests/ranker/recbole_files.py`), about half of them valid. They must agree on every
interaction, label, title and identifier, or both refuse the files, and then the fast one must name a wrong line.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings

from bench.harness import Claim, Conclusion, Raw
from tests.ranker.recbole_files import Files, compared, files

CASES, CASES_QUICK = 20_000, 200
SEED = 18


def measure(*, quick: bool) -> Iterator[Raw]:
    """Compare the readers. A case where they differ is reduced to its smallest form."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    started_s = time.perf_counter()
    wanted = CASES_QUICK if quick else CASES
    with tempfile.TemporaryDirectory() as folder:

        @seed(SEED)
        @settings(
            max_examples=wanted,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(drawn=files())
        def agree(drawn: Files) -> None:
            outcomes["begun"] += 1
            outcomes[compared(Path(folder), drawn)] += 1

        try:
            agree()
        except Exception as error:  # noqa: BLE001 - any exception is a finding
            failures.append("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
    spent_s = time.perf_counter() - started_s
    yield {"seed": SEED, "wanted": wanted, "outcomes": dict(outcomes), "failures": failures, "seconds": spent_s}


def conclude(raw: Raw) -> Conclusion:
    outcomes: Counter[str] = Counter(raw["outcomes"])
    cases = outcomes["read"] + outcomes["refused"]
    differing = outcomes["begun"] - cases
    return Conclusion(
        {
            "cases": cases,
            "read as the slow reader reads them": outcomes["read"],
            "refused by both": outcomes["refused"],
            "cases that differ or end in a traceback": differing,
            "milliseconds a case": 1e3 * raw["seconds"] / max(1, cases),
        },
        (
            Claim("datasets invented and read twice", cases, raw["wanted"], "cases", "at_least"),
            Claim("differing reads and tracebacks", differing, 0, "cases", "at_most"),
            Claim(
                "share of the datasets that can be read", 100 * outcomes["read"] / max(1, cases), 25, "%", "at_least"
            ),
        ),
    )
