"""Checks a log: every file readable, every row consistent with itself, request ids unique, clocks that do not jump."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from impressions.errors import LogError
from impressions.inspection.columns import Answers
from impressions.inspection.problem import NAMED, Problem
from impressions.inspection.references import References
from impressions.reading import LogFile, log_files, set_aside

#: Clocks of servers and producers may differ by so much.
_SKEW_MS = 60_000
_Faults = Iterator[tuple[str, np.ndarray, str, str]]


class Checker:
    """Checks the files of a log, one after the other: those of actions and seen before those of impressions.

    Holds 16 bytes for each request, and 50 for each action and report.
    """

    def __init__(self, now_ms: int) -> None:
        """Create.

        Args:
            now_ms: Unix time in milliseconds; rows beyond it come from a clock that is wrong.
        """
        self._now_ms = now_ms
        self._request_ids: list[np.ndarray] = []
        self._files: list[str] = []
        self.references = References()

    def file(self, file: LogFile) -> Iterator[Problem]:
        """Check one file."""
        try:
            rows = file.rows()
        except LogError as error:
            what, _, fix = str(error).removeprefix(f"{file.where}: ").rpartition("; ")
            yield Problem(file.where, None, "", what, fix)
            return
        for field, found, what, fix in self._faults(file, rows):
            at = np.flatnonzero(found)
            for row in at[:NAMED]:
                yield Problem(file.where, int(row), field, what, fix)
            if len(at) > NAMED:
                yield Problem(file.where, None, field, f"{len(at) - NAMED:,} more rows: {what}", fix)

    def request_ids(self) -> Iterator[Problem]:
        """Check, after all files, that no two answers have the same id."""
        if not self._request_ids:
            return
        ids = np.concatenate(self._request_ids)
        sizes = [len(one) for one in self._request_ids]
        file = np.repeat(np.arange(len(sizes)), sizes)
        row = np.concatenate([np.arange(size) for size in sizes])
        order = np.argsort(ids, kind="stable")
        again = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        fix = "count it once, as the join does; if the rows differ, two servers draw the same ids"
        for i in again[:NAMED]:
            first, second = order[i], order[i + 1]
            what = f"request {ids[second]} stands also in {self._files[file[first]]}, row {row[first]}"
            yield Problem(self._files[file[second]], int(row[second]), "request_id", what, fix)
        if len(again) > NAMED:
            last = self._files[file[order[again[NAMED] + 1]]]
            yield Problem(last, None, "request_id", f"{len(again) - NAMED:,} more repeated requests", fix)

    def _faults(self, file: LogFile, rows: pa.Table) -> _Faults:
        if file.table == "impressions":
            ids = rows["request_id"].to_numpy()
            self._request_ids.append(ids[ids != 0])
            self._files.append(file.where)
            answers = Answers(rows)
            self.references.compare(answers)
            yield from _clock(rows["time_ms"].to_numpy(), "time_ms", self._now_ms)
            yield from _answers(answers)
        elif file.table == "actions":
            self.references.add(file, rows)
            yield from _clock(rows["received_ms"].to_numpy(), "received_ms", self._now_ms)
            ahead = rows["time_ms"].to_numpy() - rows["received_ms"].to_numpy() > _SKEW_MS
            yield "time_ms", ahead, "the action is later than its arrival", "set the producer's clock"
            named = rows["request_id"].to_numpy(zero_copy_only=False)
            yield "request_id", named == 0, "0 names no request", "leave the field empty if the request is not known"
        else:
            self.references.add(file, rows)
            yield from _clock(rows["received_ms"].to_numpy(), "received_ms", self._now_ms)
            yield (
                "request_id",
                rows["request_id"].to_numpy() == 0,
                "0 names no request",
                "report the answer's request_id",
            )


def check_log(
    where: str, now_ms: int, note: Callable[[str], object] = lambda _: None, spools: Sequence[Path] = ()
) -> Iterator[Problem]:
    """Check all files of a log, and its segments up to their last whole batch.

    Args:
        where: `file:///folder`, a path, or `s3://bucket/prefix`.
        now_ms: Unix time in milliseconds.
        note: receives, at the end, what is unusual but may be as it should.
        spools: other spool folders of the log's servers.

    Raises:
        LogError: there is no log, or a spool folder is none.
    """
    checker = Checker(now_ms)
    # Answers last: a server that writes meanwhile has written the answer of each action that was read before.
    for table in ("actions", "seen", "impressions"):
        for file in log_files(where, table, spools):
            yield from checker.file(file)
    yield from checker.request_ids()
    yield from checker.references.problems()
    for one in checker.references.notes():
        note(one)
    for path in set_aside(where, spools):
        yield Problem(
            str(path), None, "", "a segment that could not be read, or not to its end, was set aside",
            "the server's event segment_not_understood says why, and what could be read is in the Parquet files; "
            "repair it and move it back to the spool folder, or delete it if you do not need its other rows",
        )  # fmt: skip


def _clock(times_ms: np.ndarray, field: str, now_ms: int) -> _Faults:
    """Find rows ahead of the clock, and rows whose time is more than a minute before that of a row before them."""
    ahead = times_ms > now_ms + _SKEW_MS
    yield field, ahead, "the time is in the future", "set the server's clock; joins of the time that follows need care"
    # A row from the future must not make all that follow look late.
    newest = (
        np.maximum.accumulate(np.where(ahead, np.iinfo(np.int64).min + _SKEW_MS, times_ms))
        if len(times_ms)
        else times_ms
    )
    back = np.zeros(len(times_ms), bool)
    back[1:] = times_ms[1:] < newest[:-1] - _SKEW_MS
    yield (
        field,
        back,
        "the clock went back by more than a minute",
        "keep the server's clock in step (NTP slews, not steps)",
    )


def _answers(answers: Answers) -> _Faults:
    bug = "a bug of the server that wrote it: report it, and leave the row out"
    yield "request_id", answers.request_ids == 0, "0 names no request", bug
    malformed = np.zeros(answers.requests, bool)
    for field, expected in answers.expected_lengths().items():
        wrong = answers.lengths(field) != expected
        malformed |= wrong
        yield field, wrong, "its length does not fit the row's pins, heads, parties and attributes", bug
    chance = answers.numbers("order_propensity")
    # The negation finds NaN, too.
    yield (
        "order_propensity",
        ~((chance > 0) & (chance <= 1)),
        "not in (0, 1]",
        "no estimate can use it: leave the row out",
    )
    yield (
        "propensities",
        answers.any_of("propensities", lambda p: ~((p > 0) & (p <= 1))),
        "not in (0, 1]",
        ("no estimate can use it: leave the row out"),
    )
    for field, (found, what) in _of_wellformed(answers, malformed).items():
        yield field, found, what, bug


def _of_wellformed(answers: Answers, malformed: np.ndarray) -> Mapping[str, tuple[np.ndarray, str]]:
    """Check what needs lists of the right length, in the rows that have them."""
    checks: dict[str, tuple[Callable[[Answers], np.ndarray], str]] = {
        "places": (_misplaced, "a pin stands twice, or at a position that the request does not have"),
        "utilities": (_other_sums, "not the parties' utilities weighed by party_weights"),
        "pin_ids": (_misordered, "the order does not follow the utilities, best first"),
    }
    well = np.flatnonzero(~malformed)
    sound = answers.rows(well) if len(well) < answers.requests else answers
    found = {}
    for field, (check, what) in checks.items():
        faults = np.zeros(answers.requests, bool)
        faults[well] = check(sound)
        found[field] = (faults, what)
    return found


def _misplaced(answers: Answers) -> np.ndarray:
    places, owner = answers.flat("places").astype(np.int64), answers.owners("places")
    candidates = answers.numbers("candidates").astype(np.int64)
    beyond = places >= candidates[owner]
    order = np.lexsort((places, owner))
    twice = np.zeros(len(places), bool)
    twice[1:] = (places[order][1:] == places[order][:-1]) & (owner[order][1:] == owner[order][:-1])
    found = np.zeros(answers.requests, bool)
    found[owner[beyond]] = True
    found[owner[order][twice]] = True
    return found


def _other_sums(answers: Answers) -> np.ndarray:
    """Compare to the bit: `UtilityTable.combine` adds in float64, in the table's order of parties."""
    found = np.zeros(answers.requests, bool)
    parties = answers.lengths("parties")
    for count in np.unique(parties):
        of_these = np.flatnonzero(parties == count)
        some = answers.rows(of_these) if len(of_these) < answers.requests else answers
        owner, utilities = some.owners("utilities"), some.flat("utilities")
        values = some.flat("party_utilities").reshape(len(owner), count)
        weights = some.flat("party_weights").reshape(some.requests, count)[owner]
        total = np.zeros(len(owner))
        with np.errstate(all="ignore"):
            for party in range(count):
                added = values[:, party] * weights[:, party]
                total = added if party == 0 else total + added
            expected = total.astype(np.float32)
        other = (expected != utilities) & ~(np.isnan(expected) & np.isnan(utilities))
        found[of_these[owner[other]]] = True
    return found


def _misordered(answers: Answers) -> np.ndarray:
    """Find answers whose utilities rise; what is not finite comes last. A drawn order may rise."""
    utilities, owner = answers.flat("utilities"), answers.owners("utilities")
    keys = np.where(np.isfinite(utilities), utilities, -np.inf)
    rises = np.zeros(len(keys), bool)
    rises[1:] = (keys[1:] > keys[:-1]) & (owner[1:] == owner[:-1])
    found = np.zeros(answers.requests, bool)
    found[owner[rises]] = True
    found &= ~answers.drawn_orders()
    return found
