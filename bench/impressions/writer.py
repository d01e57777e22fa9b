"""What the impression log costs a server: processor time per request, and for how long the event loop has to wait.

The surface explores by four arms, so that the log computes the propensities of every answer.
"""

from __future__ import annotations

import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Claim, Conclusion, Raw
from bench.processes import cpu_seconds
from bench.test_bed import SEED
from impressions.archive_process import ArchiveProcess
from impressions.reading import log_files
from impressions.writing.log import ImpressionLog, LogSettings
from impressions.writing.rows import AnsweredRequest, Constants, Exploring
from model_store.exploration.weights import WeightsExplorer
from model_store.model.selection import select
from model_store.model.utility import weighted_sum
from tests.impressions.answers import ToyScores

_CONSTANTS = Constants(
    surface="home",
    model="bench@1",
    model_digest="0" * 64,
    utility_digest="1" * 64,
    heads=("save", "click", "closeup", "hide"),
    parties=("pinner", "creator", "merchant", "ad"),
    attributes=("pin.creator_tail", "pin.price"),
)
_WEIGHTS = np.array([1.0, 0.3, 0.2, 0.1])
_ARMS = _WEIGHTS * [[1, 1.25, 1, 1], [1, 0.75, 1, 1], [1, 1, 1.5, 1], [1, 1, 0.5, 1]]
_EXPLORER = WeightsExplorer(7, 0.0125, 0.05, _WEIGHTS, ("a", "b", "c", "d"), _ARMS, np.full(4, 0.25))
_LIMIT_US, _AIM_US = 100.0, 50.0


@dataclass(frozen=True, slots=True)
class WriterPlan:
    requests: int = 10_000
    rounds: int = 3
    per_s: int = 500
    pins: int = 128
    #: Distinct answers that are offered in turn: more than the processor's caches hold.
    answers: int = 2_000
    rotate_bytes: int = 32 << 20


QUICK = WriterPlan(requests=500, rounds=1, answers=100)


def measure(*, quick: bool) -> Iterator[Raw]:
    """Yield what was measured after each round."""
    plan = QUICK if quick else WriterPlan()
    answers = _answers(plan)
    rounds: list[dict[str, float]] = []
    for _ in range(plan.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(_round(plan, answers, Path(folder)))
        yield {"plan": asdict(plan), "rounds": rounds}


def conclude(raw: Raw) -> Conclusion:
    """Compare the median round with the limit and the aim, and its waits with those without a log."""
    median = {name: float(np.median([one[name] for one in raw["rounds"]])) for name in raw["rounds"][0]}
    longer_ms = median["wait_ms_p999"] - median["wait_ms_p999_without_log"]
    claims = (
        Claim("processor time of one request / the limit of 100 us", median["us"] / _LIMIT_US, 1.0, "ratio", "at_most"),
        Claim("processor time of one request / the aim of 50 us", median["us"] / _AIM_US, 1.0, "ratio", "at_most"),
        Claim("what the log adds to the loop's P99.9 wait", longer_ms, 2.0, "ms", "at_most"),
    )
    return Conclusion(median, claims)


def _answers(plan: WriterPlan) -> list[dict[str, Any]]:
    random = np.random.default_rng(SEED)
    found: list[dict[str, Any]] = []
    for _ in range(plan.answers):
        parties = random.normal(size=(plan.pins, len(_CONSTANTS.parties)))
        utilities = weighted_sum(parties, _WEIGHTS)
        scores = ToyScores(
            select(utilities),
            utilities,
            random.beta(1, 30, (plan.pins, len(_CONSTANTS.heads))).astype(np.float32),
            parties,
        )
        found.append(
            {
                "pin_ids": random.integers(1, 1 << 63, plan.pins, np.uint64),
                "attribute_values": random.integers(0, 50, (len(_CONSTANTS.attributes), plan.pins)).astype(np.float64),
                "scores": scores,
                "exploring": Exploring("e" * 64, 7, None, _EXPLORER),
            }
        )
    return found


def _round(plan: WriterPlan, answers: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Offer requests at their rate; return microseconds of processor time per request, and waits in milliseconds."""
    spent: dict[str, float] = {}
    idle = _waits(plan, lambda _: None)
    log = ImpressionLog(LogSettings(f"file://{folder}", rotate_bytes=plan.rotate_bytes))
    threads = [
        threading.Thread(target=_timed, args=(name, work, spent), daemon=True)
        for name, work in (("writer", log.write), ("archive_thread", log.archive_segments))
    ]
    before_s = _children_s()
    for thread in threads:
        thread.start()
    started_s = _settled(log.archive)
    offering_s = 0.0

    def offer(number: int) -> None:
        nonlocal offering_s
        begun_s = time.thread_time()
        log.offer_impression(
            AnsweredRequest(
                request_id=number + 1, time_ms=int(time.time() * 1e3), user_id=number % 977, label="stable",
                constants=_CONSTANTS, degradation={}, party_weights=_WEIGHTS, **answers[number % len(answers)],
            )
        )  # fmt: skip
        offering_s += time.thread_time() - begun_s

    waits = _waits(plan, offer)
    log.close()
    for thread in threads:
        thread.join()
    files = list(log_files(str(folder), "impressions"))
    rows = sum(file.rows().num_rows for file in files)
    if rows != plan.requests or any(file.segment for file in files):
        raise RuntimeError(f"{plan.requests} requests were offered, and {rows} are in the log")
    spent |= {"offer": offering_s, "archive_process": _children_s() - before_s - started_s}
    us = {name: 1e6 * seconds / plan.requests for name, seconds in spent.items()}
    return {
        "us": sum(us.values()),
        **{f"us_{name}": value for name, value in us.items()},
        "ms_to_start_the_archive_process": 1e3 * started_s,
        "bytes_per_request": sum(file.bytes for file in files) / rows,
        "wait_ms_p999": float(np.percentile(waits, 99.9)),
        "wait_ms_max": float(np.max(waits)),
        "wait_ms_p999_without_log": float(np.percentile(idle, 99.9)),
        "wait_ms_max_without_log": float(np.max(idle)),
    }


def _children_s() -> float:
    """Return the processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _settled(archive: ArchiveProcess) -> float:
    """Wait until the process has started and waits for work; return the processor time that it took."""
    before_s, used_s = -1.0, 0.0
    while used_s != before_s or not used_s:
        before_s = used_s
        time.sleep(0.5)
        used_s = cpu_seconds(archive.pid) if archive.pid else 0.0
    return used_s


def _timed(name: str, work: Callable[[], None], spent: dict[str, float]) -> None:
    begun_s = time.thread_time()
    work()
    spent[name] = time.thread_time() - begun_s


def _waits(plan: WriterPlan, offer: Callable[[int], None]) -> np.ndarray:
    """Offer at the rate. Return float64, in milliseconds: how late this thread woke from each of many short sleeps.

    An event loop that wants the interpreter while the writer holds it waits as long as this thread does.
    """
    late, begun_s, offered = [], time.perf_counter(), 0
    while offered < plan.requests:
        due_s = time.perf_counter() + 0.0002
        time.sleep(0.0002)
        now_s = time.perf_counter()
        late.append(1e3 * (now_s - due_s))
        while offered < min(plan.requests, (now_s - begun_s) * plan.per_s):
            offer(offered)
            offered += 1
    return np.array(late)
