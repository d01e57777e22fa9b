"""What users, operators and other versions leave in a spool folder, or do to it, loses no row of a log."""

from __future__ import annotations

import fcntl
import shutil
import time
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from impressions import archive
from impressions.archive import DAMAGED, ClockSteps
from impressions.errors import LogError
from impressions.inspection.check import check_log
from impressions.places import Place, new_stem, open_place
from impressions.schema import IMPRESSIONS, fingerprint
from impressions.segments import Segment, clear_unborn, segments
from impressions.writing.rows import RecordedAction, RecordedActions, SeenReport
from tests.impressions.answers import answered
from tests.impressions.log_files import archive_of, finish, ids, opened, parquet, write_segment


@pytest.mark.parametrize("name", ["impressions-old", "backup-2026-11-29", "impressions-a-b-c-d", "copy"])
def test_a_segment_with_a_foreign_name_is_set_aside_and_the_others_become_files(tmp_path: Path, name: str) -> None:
    stray = write_segment(tmp_path).rename(tmp_path / "spool" / f"{name}.arrows")
    assert segments(tmp_path / "spool") == []
    log = opened(tmp_path)
    log.offer_impression(answered(9))
    finish(log)
    assert ids(tmp_path) == [9]
    assert (tmp_path / "spool" / DAMAGED / stray.name).exists()
    (problem,) = check_log(str(tmp_path), 1 << 60)
    assert stray.name in problem.where


def test_what_was_set_aside_before_is_kept(tmp_path: Path) -> None:
    for content in (b"one", b"two", b"three"):
        (tmp_path / "spool").mkdir(exist_ok=True)
        (tmp_path / "spool" / "copy.arrows").write_bytes(content)
        finish(opened(tmp_path))
    found = sorted((tmp_path / "spool" / DAMAGED).iterdir())
    assert [path.name for path in found] == ["copy-1.arrows", "copy-2.arrows", "copy.arrows"]
    assert {path.read_bytes() for path in found} == {b"one", b"two", b"three"}


@pytest.mark.parametrize("kind", ["folder", "loop"])
def test_an_entry_that_cannot_be_opened_is_reported_and_holds_up_no_other(tmp_path: Path, kind: str) -> None:
    bad = tmp_path / "spool" / "actions-2026-01-01-000000-host-1.arrows"  # comes before all others
    bad.parent.mkdir()
    if kind == "folder":
        bad.mkdir()
    else:
        bad.symlink_to(bad.name)
    log = opened(tmp_path)
    log.offer_impression(answered(1))
    log.close()
    log.write()
    with pytest.raises(OSError, match=bad.name):
        log.archive_segments()
    assert ids(tmp_path) == [1]
    assert segments(tmp_path / "spool") == [bad]


def test_rows_of_another_version_become_a_file_with_its_fingerprint(tmp_path: Path) -> None:
    """A rolling upgrade: the old server was killed, and the new one finds its segment."""
    older = IMPRESSIONS.remove(IMPRESSIONS.get_field_index("arm"))
    (tmp_path / "spool").mkdir()
    left = Segment(tmp_path / "spool", new_stem("impressions", 1), older)
    whole = write_segment(tmp_path / "whole")
    rows = pa.ipc.open_stream(whole.read_bytes()).read_all().drop_columns(["arm"])
    left.append(rows.combine_chunks().cast(older).to_batches()[0])
    left.close()
    finish(opened(tmp_path))
    assert not segments(tmp_path / "spool")
    assert not (tmp_path / "spool" / DAMAGED).exists()
    (file,) = parquet(tmp_path)
    assert pa.parquet.read_table(file).num_rows == 4
    with pytest.raises(LogError, match=f"{file}: written by another version of pinrank.*{fingerprint(older)}"):
        ids(tmp_path)


@pytest.mark.parametrize("moved", [False, True])
def test_a_log_goes_on_after_its_folder_was_removed_or_moved(tmp_path: Path, moved: bool) -> None:
    log = opened(tmp_path / "log")
    log.offer_impression(answered(1))
    log.flush()
    if moved:
        (tmp_path / "log").rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(tmp_path / "log")
    log.offer_impression(answered(2))
    log.flush()
    assert ids(tmp_path / "log") == [2]  # at once, and not after the next rotation
    if moved:
        assert ids(tmp_path / "elsewhere") == [1]
    finish(log)
    assert ids(tmp_path / "log") == [2]


def test_a_segment_that_another_process_clears_before_it_is_locked_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive of a second server sees the file between its creation and its lock."""
    lock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        with monkeypatch.context() as inner:
            inner.setattr(fcntl, "flock", lock)
            clear_unborn(tmp_path / "spool")
        lock(descriptor, operation)

    log = opened(tmp_path)
    log.offer_impression(answered(1))
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", late)
        with pytest.raises(FileNotFoundError, match="another process cleared it"):
            log.flush()
    assert log.queued_bytes
    assert not list((tmp_path / "spool").iterdir())
    finish(log)
    assert ids(tmp_path) == [1]


def test_a_failed_file_leaves_no_part_behind_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(tmp_path)
    log.offer_impression(answered(1))
    log.close()
    log.write()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
        with pytest.raises(OSError, match="No space left"):
            archive_of(log).look()
    assert not [path for path in (tmp_path / "impressions").rglob("*") if path.is_file()]
    archive_of(log).look()
    assert ids(tmp_path) == [1]


def test_reports_and_actions_leave_half_of_the_queue_to_answers(tmp_path: Path) -> None:
    log = opened(tmp_path, queue_bytes_max=100_000)
    while log.offer_seen(SeenReport(1, 1, np.zeros(100, np.uint32))):
        pass
    one = RecordedAction(3, 4, 5, "save", "home", 6, 7, None, None)
    assert not log.offer_actions(RecordedActions(5, lambda: [one] * 5))
    assert 49_000 < log.queued_bytes <= 50_000
    taken = sum(log.offer_impression(answered(i)) for i in range(1, 200))
    assert log.queued_bytes > 98_000
    finish(log)
    assert ids(tmp_path) == list(range(1, taken + 1))


def test_a_batch_is_bounded_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impressions.writing.log._BATCH_BYTES", 10_000)
    log = opened(tmp_path)
    for i in range(1, 8):
        log.offer_impression(answered(i, features=lambda: b"x" * 100, features_bytes=4_000 if i < 7 else 50_000))
    log.flush()
    (segment,) = segments(tmp_path / "spool")
    batches = [batch.num_rows for batch in pa.ipc.open_stream(segment.read_bytes()) if batch.num_rows]
    assert (max(batches), sum(batches)) == (1, 7)
    finish(log)
    assert ids(tmp_path) == list(range(1, 8))


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LogError, match="/file/log: cannot create the folder of the log: Not a directory"):
        opened(tmp_path / "file" / "log", spool_folder=tmp_path / "spool")
    with pytest.raises(LogError, match="the address of the log is empty"):
        open_place("")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "impressions").write_bytes(b"")
    with pytest.raises(LogError, match=f"{tmp_path}: cannot be listed: .*check its name"):
        ids(tmp_path)


def test_a_folder_with_the_name_of_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "impressions" / "2026-01-01" / "120000-x.parquet").mkdir(parents=True)
    write_segment(tmp_path)
    assert ids(tmp_path) == [1, 2, 3, 4]


def test_a_clock_that_stepped_is_not_steady_for_a_day() -> None:
    hour, day, year = 3_600.0, 86_400.0, 365 * 86_400.0
    clock = ClockSteps(1e9 - 50.0)
    assert clock.steady(1e9 + hour, 50.0 + hour)
    assert not clock.steady(1e9 + year, 50.0 + 2 * hour)
    assert not clock.steady(1e9 + year + day - 60, 50.0 + 2 * hour + day - 60)
    assert not clock.steady(1e9 + 2 * hour + day, 50.0 + 2 * hour + day)  # it was set right: another step
    assert clock.steady(1e9 + 2 * hour + 2 * day, 50.0 + 2 * hour + 2 * day)


def test_retention_makes_room_on_a_disk_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator lowers `retention_days` because the disk is full, and starts the server again."""
    old = tmp_path / "impressions" / "2020-01-01" / "120000-host-1-000000-1.parquet"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    log = opened(tmp_path, retention_days=30)
    log.offer_impression(answered(1))
    log.flush()
    log._end("impressions")
    written = pa.parquet.ParquetWriter.write_table

    def full_until_then(*arguments: object, **options: object) -> None:
        if old.exists():
            raise OSError(28, "No space left on device")
        written(*arguments, **options)

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full_until_then)
    archive_of(log).look()
    assert not old.exists()
    assert ids(tmp_path) == [1]


def test_two_servers_that_delete_the_same_old_file_do_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [tmp_path / "impressions" / "2020-01-01" / f"12000{i}-host-1-000000-1.parquet" for i in range(2)]
    old[0].parent.mkdir(parents=True)
    for path in old:
        path.write_bytes(b"x")
    log = opened(tmp_path, retention_days=30)
    listed = archive.parquet_files

    def after_the_other(place: Place) -> list[str]:
        found = listed(place)
        old[0].unlink()
        return found

    monkeypatch.setattr(archive, "parquet_files", after_the_other)
    archive_of(log)._delete_old()
    assert not old[1].exists()


def test_nothing_is_deleted_after_the_clock_stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    kept = tmp_path / "impressions" / day / "000000-host-1-000000-1.parquet"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x")
    log = opened(tmp_path, retention_days=30)
    later_s = time.time() + 400 * 86_400

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(later_s, tz)

    with monkeypatch.context() as patched:
        patched.setattr(archive, "datetime", Later)
        patched.setattr(time, "time", lambda: later_s)
        archive_of(log)._delete_old()
        assert kept.exists()
        archive_of(opened(tmp_path, retention_days=30))._delete_old()  # one that started with this clock believes it
    assert not kept.exists()
