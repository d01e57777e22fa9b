"""The join under careless hands: options out of range, files from other tools, and a log that changes meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from impressions.dataset import JoinError, read_manifest, read_slates, read_unattributed
from impressions.joining.join import Wanted, join_log
from impressions.reading import Selection
from tests.impressions.logs import action, impression, reader, table
from tests.impressions.random_logs import BASE_MS, WINDOW, attributed_of, reasons_of
from tests.impressions.test_join_command import run, small_log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", "9" * 400 + "d"), "more than 100 years; write a shorter time, e.g. --window 30m"),
        (("--window", "36501d"), "error: --window 36501d: more than 100 years"),
        (("--window", "30m", "--clock-skew", "99999999h"), "error: --clock-skew 99999999h: more than 100 years"),
        (("--window", "30m", "--since", "2023-13-01"), "error: --since 2023-13-01: write a date or a time"),
    ],
)
def test_options_out_of_range_end_with_an_error_that_names_the_fix(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, output = run("join", small_log(tmp_path / "log"), "--out", tmp_path / "out", *options)
    assert code == 1
    assert message in output


def with_file(folder: Path, **columns: pa.Array) -> tuple[int, str]:
    """Join the small log with a file of one action, by user 7 on pin 12 of request 2, some columns of it changed."""
    plain = {
        "event_id": pa.array([9], pa.uint64()),
        "user_id": pa.array([7], pa.uint64()),
        "pin_id": pa.array([12], pa.uint64()),
        "action": pa.array(["save"]),
        "time_ms": pa.array([BASE_MS + 70_000]),
    }
    pq.write_table(pa.table({**plain, **columns}), folder / "more.parquet")
    return run(
        *("join", small_log(folder / "log"), "--window", "30m", "--out", folder / "out"),
        *("--actions", folder / "more.parquet"),
    )


@pytest.mark.parametrize("name", ["event_id", "user_id", "pin_id", "request_id"])
def test_ids_as_floats_are_refused_because_they_are_rounded(tmp_path: Path, name: str) -> None:
    """pandas makes floats of a column of ids in which some are missing."""
    code, output = with_file(tmp_path, **{name: pa.array([2.0])})
    assert code == 1
    assert f"column {name} is double, which rounds ids above 2**53; write it as uint64 (pandas: dtype UInt64" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit_are_times(tmp_path: Path, unit: str) -> None:
    instant = pa.array([BASE_MS + 70_000]).cast(pa.timestamp("ms", "UTC")).cast(pa.timestamp(unit, "UTC"), safe=False)
    code, output = with_file(tmp_path, time_ms=instant)
    assert code == 0, output
    assert attributed_of(tmp_path / "out")[7, 9] == (2, 1)


def test_seconds_are_refused(tmp_path: Path) -> None:
    code, output = with_file(tmp_path, time_ms=pa.array([BASE_MS // 1_000]))
    assert code == 1
    assert (
        "column time_ms looks like seconds (the latest is 1700000000); it must be Unix time in milliseconds" in output
    )


def test_an_action_that_is_read_has_its_request_though_servers_write_meanwhile(tmp_path: Path) -> None:
    """After each reading of a table, a request and its action are added to the log, in one moment."""
    impressions, actions = [impression(1, BASE_MS, 7, [10])], [action(1, 7, 10, BASE_MS + 5, request_id=1)]

    def growing(name: str, _: Selection) -> Iterator[pa.Table]:
        rows = {"impressions": impressions, "actions": actions, "seen": []}[name]
        yield table(name, rows)
        new = len(impressions) + 1
        impressions.append(impression(new, BASE_MS + new, 7, [10]))
        actions.append(action(new, 7, 10, BASE_MS + new + 5, request_id=new))

    join_log(growing, tmp_path / "out", Wanted(WINDOW))
    assert reasons_of(tmp_path / "out") == {}
    assert attributed_of(tmp_path / "out") == {(7, 1): (1, 0)}
    assert read_manifest(tmp_path / "out").counts.requests == 2


def test_a_log_that_loses_requests_while_it_is_joined_is_refused(tmp_path: Path) -> None:
    """Retention deletes a day between the two readings of the impressions."""
    both = [table("impressions", [impression(i, BASE_MS + i, 7, [10])]) for i in (1, 2)]
    readings = iter([both, both[1:]])

    def shrinking(name: str, needed: Selection) -> Iterator[pa.Table]:
        return iter(next(readings)) if name == "impressions" else reader({})(name, needed)

    with pytest.raises(JoinError, match=r"the log has lost 1 of its requests while it was joined .*--since"):
        join_log(shrinking, tmp_path / "out", Wanted(WINDOW))
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_named_with_the_room_that_a_join_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    log = small_log(tmp_path / "log")
    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    code, output = run("join", log, "--window", "30m", "--out", tmp_path / "out")
    assert code == 1
    assert "out: the disk is full; a join needs two to three times the size of the log's impressions there" in output
    assert not list((tmp_path / "out").iterdir())


def test_a_dataset_with_damaged_pages_is_named(tmp_path: Path) -> None:
    code, output = run("join", small_log(tmp_path / "log"), "--window", "30m", "--out", tmp_path / "out")
    assert code == 0, output
    for path in (tmp_path / "out").glob("*.parquet"):
        path.write_bytes(zeroed(path))
    for read in (read_slates, read_unattributed):
        with pytest.raises(
            JoinError, match=r"(?s)parquet is damaged or missing: .*; run `pinrank impressions join` again"
        ):
            read(tmp_path / "out")


def zeroed(path: Path) -> bytes:
    """Return a file's content with its first half overwritten; its footer stays."""
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    data = len(content) - footer
    return content[:4] + b"\xff" * (data - 4) + content[data:]
