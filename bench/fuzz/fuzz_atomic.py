"""Fuzz the RecBole reader: compare it with a slow and obviously correct one.

Both read generated files (`tests/ranker/recbole_files.py`), about half of them valid. They must agree on every
interaction, label, title and identifier, or both refuse the files, and then the fast one must name a wrong line.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings

from bench.harness import Claim, Measurement
from tests.ranker.recbole_files import Files, compared, files

CASES, CASES_QUICK = 20_000, 200
SEED = 18


def measure(*, quick: bool) -> Measurement:
    """Compare the readers. A case where they differ is reduced to its smallest form."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:

        @seed(SEED)
        @settings(
            max_examples=CASES_QUICK if quick else CASES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(drawn=files())
        def agree(drawn: Files) -> None:
            outcomes["begun"] += 1
            outcomes[compared(Path(folder), drawn)] += 1

        try:
            agree()
        except Exception as error:  # noqa: BLE001 - any exception is a finding
            failures.append("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
    cases = outcomes["read"] + outcomes["refused"]
    differing = outcomes["begun"] - cases
    spent_s = time.perf_counter() - started_s
    return Measurement(
        {
            "cases": cases,
            "read as the slow reader reads them": outcomes["read"],
            "refused by both": outcomes["refused"],
            "cases that differ or end in a traceback": differing,
            "milliseconds a case": 1e3 * spent_s / max(1, cases),
        },
        (
            Claim("datasets invented and read twice", cases, CASES_QUICK if quick else CASES, "cases", "at_least"),
            Claim("differing reads and tracebacks", differing, 0, "cases", "at_most"),
            Claim(
                "share of the datasets that can be read", 100 * outcomes["read"] / max(1, cases), 25, "%", "at_least"
            ),
        ),
        {"seed": SEED, "outcomes": dict(outcomes), "failures": failures, "seconds": spent_s},
    )
