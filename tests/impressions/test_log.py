"""The writer of the log: real files, and disks that fail."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from impressions import archive as archive_module
from impressions.archive import DAMAGED
from impressions.reading import log_files, read_tables
from impressions.schema import TABLES
from impressions.segments import Segment, segments
from impressions.writing.batches import actions_batch
from impressions.writing.rows import RecordedAction, RecordedActions, SeenReport
from tests.impressions.answers import answered
from tests.impressions.log_files import archive_of, finish, ids, opened, parquet

ROOT = Path(__file__).parents[2]


def test_rows_of_all_tables_come_back_as_they_were_offered(tmp_path):
    log = opened(tmp_path)
    row = answered(1, degradation={"missing_pins": 2}, query_pin_id=9, query_vector=np.array([1, 2], np.float32))
    assert log.offer_impression(row)
    assert log.offer_seen(SeenReport(1, 5, np.array([0, 2], np.uint32), 4))
    action = RecordedAction(3, 4, 5, "save", "home", 6, 7, None, None)
    assert log.offer_actions(RecordedActions(1, lambda: [action]))
    log.flush()
    before = {table: [part.to_pylist() for part in read_tables(str(tmp_path), table)] for table in TABLES}
    finish(log)
    assert not segments(tmp_path / "spool")
    after = {table: [part.to_pylist() for part in read_tables(str(tmp_path), table)] for table in TABLES}
    assert before == after
    ((found,),) = after["impressions"]
    order = row.scores.order
    assert found["pin_ids"] == row.pin_ids[order].tolist()
    assert found["probabilities"] == row.scores.probabilities[order].ravel().tolist()
    assert found["attribute_values"] == row.attribute_values.T[order].ravel().tolist()
    assert (found["degradation"], found["query_vector"]) == ([("missing_pins", 2)], [1.0, 2.0])
    assert after["seen"] == [[{"request_id": 1, "received_ms": 5, "positions": [0, 2], "user_id": 4}]]
    assert after["actions"][0][0]["request_id"] is None


def test_actions_are_rows_of_their_table_and_the_writer_rests_while_it_converts_many():
    assert list(RecordedAction._fields) == TABLES["actions"].names
    rows = [RecordedAction(i, 4, 5, "save", ("home", "related")[i % 2], 6, 7, i or None, None) for i in range(1_000)]
    rests = []
    batch = actions_batch(
        [RecordedActions(600, lambda: rows[:600]), RecordedActions(400, lambda: iter(rows[600:]))],
        lambda: rests.append(1),
    )
    assert batch.to_pylist() == [row._asdict() for row in rows]
    assert len(rests) >= 1_000 // 256 + len(TABLES["actions"])


def test_names_say_table_day_time_host_and_process(tmp_path):
    log = opened(tmp_path)
    log.offer_impression(answered(1))
    finish(log)
    (path,) = parquet(tmp_path)
    day = datetime.now(UTC)
    assert path.parent.parent.name == "impressions"
    assert path.parent.name in {f"{day:%Y-%m-%d}", f"{day - timedelta(hours=1):%Y-%m-%d}"}
    assert str(os.getpid()) in path.name
    assert path.name == path.name.lower()


def test_a_full_queue_drops_and_counts_and_takes_rows_again(tmp_path):
    log = opened(tmp_path, queue_bytes_max=20_000)
    taken = [log.offer_impression(answered(i)) for i in range(1, 41)]
    counts = log.tables["impressions"]
    assert 0 < sum(taken) < 40
    assert taken == sorted(taken, reverse=True)
    assert (counts.accepted, counts.dropped) == (sum(taken), 40 - sum(taken))
    log.flush()
    assert log.queued_bytes == 0
    assert log.offer_impression(answered(41))
    finish(log)
    assert ids(tmp_path) == [i for i, kept in enumerate(taken, 1) if kept] + [41]
    assert counts.written == counts.accepted


def test_a_row_that_cannot_be_converted_is_counted_and_holds_up_no_other(tmp_path):
    log = opened(tmp_path)
    for i in range(1, 6):
        log.offer_impression(answered(i, party_weights=None) if i == 3 else answered(i))
    finish(log)
    counts = log.tables["impressions"]
    assert (counts.written, counts.unfit) == (4, 1)
    assert ids(tmp_path) == [1, 2, 4, 5]


def test_size_and_age_end_a_segment(tmp_path):
    log = opened(tmp_path, rotate_bytes=30_000)
    for i in range(1, 200):
        log.offer_impression(answered(i))
        log.flush()
    found = [file for file in log_files(str(tmp_path), "impressions") if file.segment]
    assert len(found) > 3
    assert max(file.bytes for file in found) < 60_000
    old = opened(tmp_path / "old", rotate_s=0.0)
    for i in range(1, 4):
        old.offer_impression(answered(i))
        old.flush()
    assert len(segments(tmp_path / "old" / "spool")) == 3
    finish(old)
    assert ids(tmp_path / "old") == [1, 2, 3]


@pytest.mark.parametrize("failing", ["new", "append"])
def test_rows_wait_while_the_disk_is_full_and_none_is_lost(tmp_path, monkeypatch, failing):
    log = opened(tmp_path)
    log.offer_impression(answered(1))
    if failing == "append":
        log.flush()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Segment, "append" if failing == "append" else "__init__", full)
        for i in range(2, 5):
            log.offer_impression(answered(i))
            with pytest.raises(OSError, match="No space left"):
                log.flush()
        assert log.queued_bytes
    log.offer_impression(answered(5))
    finish(log)
    assert ids(tmp_path) == [1, 2, 3, 4, 5]
    assert not (tmp_path / "spool" / DAMAGED).exists()


def test_a_disk_that_is_full_in_the_middle_of_a_batch_loses_nothing(tmp_path):
    """A child may write files of 64 KiB only; then it may write larger ones, as after somebody made room."""
    child = """
import resource, signal, sys
from pathlib import Path
from impressions.writing.log import ImpressionLog, LogSettings
from tests.impressions.answers import answered
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
log = ImpressionLog(LogSettings(f"file://{sys.argv[1]}"))
failures = 0
for i in range(1, 401):
    log.offer_impression(answered(i, pins=20))
    if i % 50 == 0:
        try:
            log.flush()
        except OSError:
            failures += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.close()
log.write()
log.archive_segments()
print(failures, log.archive.damaged)
"""
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    failures, damaged = map(int, done.stdout.split()[-2:])
    assert failures > 1
    assert damaged == 0
    assert ids(tmp_path) == list(range(1, 401))


def test_an_archive_that_fails_is_tried_again_and_nothing_is_lost(tmp_path, monkeypatch):
    log = opened(tmp_path)
    real, calls = archive_module.write_parquet, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(*arguments)

    monkeypatch.setattr(archive_module, "write_parquet", failing)
    log.offer_impression(answered(1))
    log.close()
    log.write()
    for _ in range(2):
        with pytest.raises(OSError, match="Permission denied"):
            archive_of(log).look()
        assert len(segments(tmp_path / "spool")) == 1
        assert ids(tmp_path) == [1]
    archive_of(log).look()
    assert ids(tmp_path) == [1]
    assert not segments(tmp_path / "spool")


def test_batches_with_new_names_extend_a_segment(tmp_path):
    """Each batch brings names that the batches before it lack."""
    log = opened(tmp_path)
    for i in range(1, 20):
        log.offer_impression(answered(i, label=f"label-{i}"))
        log.flush()
    finish(log)
    rows = pa.concat_tables(read_tables(str(tmp_path), "impressions"))
    assert rows["label"].to_pylist() == [f"label-{i}" for i in range(1, 20)]


def test_a_spool_folder_that_is_full_takes_no_more_until_it_has_room(tmp_path):
    log = opened(tmp_path, spool_bytes_max=20_000, rotate_bytes=1)
    for first in range(1, 200):
        log.offer_impression(answered(first))
        try:
            log.flush()
        except OSError as error:
            refused = error
            break
    assert "impressions.spool_bytes_max" in str(refused)
    written = log.tables["impressions"].written
    assert 0 < written < log.tables["impressions"].accepted
    archive_of(log).archive_all()
    log.flush()
    assert sorted(ids(tmp_path)) == list(range(1, first + 1))


def test_a_writer_that_cannot_finish_lets_the_archive_end(tmp_path, monkeypatch):
    log = opened(tmp_path)
    log.offer_impression(answered(1))
    log.flush()
    log.offer_impression(answered(2))
    monkeypatch.setattr("impressions.writing.log.Segment.append", broken_disk)
    log.close()
    with pytest.raises(OSError, match="no room"):
        log.write()
    log.archive_segments()
    assert ids(tmp_path) == [1]
    assert len(parquet(tmp_path)) == 1


def broken_disk(*_):
    raise OSError(errno.ENOSPC, "no room")
